"""How the processes of a run find one another, on one host or on several."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as torch_dist

from fastssl.config import RunConfig
from fastssl.errors import ConfigError, PeerLostError
from fastssl.machine.private_api import join_store, set_world_group
from fastssl.processes.watchdog import is_loss, probe_connections, reason_of

# What a launcher would set for a process without others; DeepSpeed reads it.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def join(backend: str, cfg: RunConfig) -> None:
    """Make the process group of all processes that a launcher has started, or of this one alone.

    Args:
        backend: "gloo" or "nccl".
        cfg: Its timeouts.

    Raises:
        ConfigError: a launcher has set only some of its variables, or its port is in use by something else.
        PeerLostError: the other processes do not come in time, or cannot be reached.
    """
    if "RANK" not in os.environ:
        os.environ.update(ALONE)
        _join_alone(backend)
        return
    _join_others(backend, cfg, for_deepspeed=True)


@contextmanager
def joined_processes(cfg: RunConfig) -> Iterator[None]:
    """A gloo group of the processes that a launcher has started, for work without DeepSpeed; alone, no group.

    Args:
        cfg: Its timeouts.

    Raises:
        ConfigError: a launcher has set only some of its variables.
        PeerLostError: the other processes do not come in time, or one of them is lost in the `with` block.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    _join_others("gloo", cfg, for_deepspeed=False)
    probe_connections(cfg.peer_timeout_s)
    try:
        yield
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise PeerLostError(
            f"lost another process ({reason_of(error)}), noticed by rank {os.environ['RANK']} on "
            f"{socket.gethostname()}: read the messages of the other processes, then start all of them again"
        ) from None
    torch_dist.destroy_process_group()


def _join_others(backend: str, cfg: RunConfig, *, for_deepspeed: bool) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        is_set = next(name for name in names if name in os.environ)
        raise ConfigError(
            f"the environment variable {is_set} is set, but not {', '.join(missing)}: start with deepspeed or "
            "torchrun, or set all of them"
        )
    if os.environ["WORLD_SIZE"] == "1":
        _join_alone(backend)
        return
    _check_port()
    try:
        _make_groups(backend, cfg, for_deepspeed=for_deepspeed)
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not is_loss(error):
            raise
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PeerLostError(
            f"not all {os.environ['WORLD_SIZE']} processes connected to {address} within "
            f"run.rendezvous_timeout_s={cfg.rendezvous_timeout_s} s ({reason_of(error)}; seen on "
            f"{socket.gethostname()}): check that every host has started its processes and can reach this address, and "
            "that GLOO_SOCKET_IFNAME names the right network interface"
        ) from None


def _join_alone(backend: str) -> None:
    """A group of this process: no other needs an address, so that two trainings on a machine never want one port."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # it listens all the same: for this machine only
    store = torch_dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch_dist.init_process_group(backend, store=store, rank=0, world_size=1)
    set_world_group(None)


def _check_port() -> None:
    """Rank 0: refuse a port on which something listens already; torchrun listens itself.

    Raises:
        ConfigError: names the option that sets another.
    """
    if os.environ["RANK"] != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = int(os.environ["MASTER_PORT"])
    try:
        _listen(port).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ConfigError(f"port {port} of this machine is in use, {_another_port()}") from None


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _another_port() -> str:
    with _listen(0) as free:
        port = free.getsockname()[1]
    return (
        f"perhaps by another training: start this one on a free port, such as with deepspeed --master_port {port}, "
        f"torchrun --master_port {port} or, without a launcher, MASTER_PORT={port}"
    )


def _check_run(store: Any, cfg: RunConfig) -> None:
    """Before anything else is exchanged: whether rank 0 trains in the same folder, or this is another run's store.

    The ranks of a second training on this machine find the first one's store at the port that their rank 0 cannot take.

    Raises:
        ConfigError: rank 0 trains in another folder.
    """
    if os.environ["RANK"] == "0":
        store.set("fastssl/run.dir", cfg.dir)
    elif (other := store.get("fastssl/run.dir").decode()) != cfg.dir:
        raise ConfigError(
            f"run.dir is {cfg.dir}, but rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} trains in "
            f"{other}: give all processes one run.dir; or the port is in use, {_another_port()}"
        )


def _make_groups(backend: str, cfg: RunConfig, *, for_deepspeed: bool) -> None:
    _wait_for_master(time.monotonic() + cfg.rendezvous_timeout_s)
    store, rank, world_size = join_store(timedelta(seconds=cfg.rendezvous_timeout_s))
    _check_run(store, cfg)
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    timeout = timedelta(seconds=cfg.collective_timeout_s)
    store = torch_dist.PrefixStore("fastssl", store)  # pyright: ignore[reportPrivateImportUsage]
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if for_deepspeed:
        set_world_group(torch_dist.new_group(timeout=timeout) if world_size > 1 else None)


def _wait_for_master(deadline_s: float) -> None:
    """Until rank 0 listens. torch waits too, but prints a C++ stack for every attempt that failed.

    Raises:
        OSError: It does not, or it cannot be reached.
    """
    if os.environ["RANK"] == "0":
        return
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            socket.create_connection(address, timeout=max(left_s, 0.1)).close()
            return
        except OSError:
            if left_s <= 0:
                raise
        time.sleep(min(0.5, max(left_s, 0)))


def interface_towards(host: str) -> str | None:
    """The network interface that leads to a host; None where that is unknown.

    gloo would take the one of this host's name, which Debian's /etc/hosts puts on the loopback.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if own in (each.address for each in addresses)), None)
