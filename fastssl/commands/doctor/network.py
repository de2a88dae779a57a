"""Checks of the communication between the processes of a run."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from fastssl.commands.doctor.finding import Finding, Node

_ALL_REDUCE = "fastssl.commands.doctor.all_reduce"
_TIMEOUT_S = 180  # enough for two processes to import torch on a busy machine
_POLL_S = 0.02
_MAX_RANKS = 8


def check_interfaces(_: Node) -> Finding:
    """This host's name and its network interfaces, and those that the environment names."""
    addresses = {
        name: [each.address for each in found if each.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    shown = ", ".join(f"{name} {' '.join(found)}" for name, found in addresses.items() if found)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted and not wanted.startswith("^") and not _some_match(wanted.removeprefix("="), addresses):
            return Finding("fail", f"{variable}={wanted}, but there are {shown}", f"set {variable} to one of them")
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        advice = "for several hosts set MASTER_ADDR to an IP address, or add the name to /etc/hosts"
        return Finding("warn", f"{shown}; the host name {name} does not resolve", advice)
    if own.startswith("127."):
        advice = "for several hosts set MASTER_ADDR to an IP address, not to this name"
        return Finding("warn", f"{shown}; the host name {name} resolves to {own}, the loopback", advice)
    return Finding("ok", f"{shown}; the host name {name} resolves to {own}")


def check_gloo(_: Node) -> Finding:
    """An all-reduce over two processes of this host."""
    return _finding("gloo", 2)


def check_nccl(node: Node) -> Finding:
    """An all-reduce over the GPUs of this host."""
    if not node.num_gpus:
        return node.without_gpu("NCCL")
    from torch.cuda import nccl

    found = _finding("nccl", min(node.num_gpus, _MAX_RANKS))
    return found._replace(detail=f"NCCL {'.'.join(map(str, nccl.version()))}; {found.detail}")


def _finding(backend: str, num_ranks: int) -> Finding:
    try:
        latency_ms, bytes_per_s = _all_reduce(backend, num_ranks)
    except RuntimeError as error:
        hint = (
            "run it again with NCCL_DEBUG=INFO for the reason"
            if backend == "nccl"
            else "check for a firewall between processes, or try GLOO_SOCKET_IFNAME=lo"
        )
        return Finding("fail", f"an all-reduce with {backend} failed ({error})", hint)
    return Finding(
        "ok",
        f"an all-reduce with {backend} over {num_ranks} processes of this host: {latency_ms:.2f} ms for one number, "
        f"{bytes_per_s / 1e6:,.0f} MB/s for 16 MB",
    )


def _all_reduce(backend: str, num_ranks: int) -> tuple[float, float]:
    """(ms for one number, bytes per second for 16 MB), measured by rank 0 in separate processes.

    Their stdout is not used for results, because NCCL prints its version and log there.

    Raises:
        RuntimeError: the processes fail, or do not end in time.
    """
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    ranks: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, f"rank{rank}.txt") for rank in range(num_ranks)]
        try:
            for rank, file in enumerate(said):
                command = [sys.executable, "-m", _ALL_REDUCE, backend, str(num_ranks), folder, str(rank)]
                with file.open("wb") as err:
                    ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=err))
            failed = _first_failure(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed is not None:
            lines = said[failed].read_text(errors="replace").strip().splitlines()
            reason = lines[-1][:200] if lines else f"exit code {ranks[failed].returncode}"
            raise RuntimeError(f"rank {failed}: {reason}")
        found = json.loads(Path(folder, "found.json").read_text())
    return found["latency_ms"], found["bytes_per_s"]


def _first_failure(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """The rank that failed first, for which the others then wait; None: all ended successfully.

    Raises:
        RuntimeError: the ranks do not end in time.
    """
    end_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < end_s:
        codes = [process.poll() for process in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(_POLL_S)
    raise RuntimeError(f"not finished after {_TIMEOUT_S} s")


def _some_match(wanted: str, names: dict[str, list[str]]) -> bool:
    """Whether an interface matches; NCCL takes a list of prefixes, gloo a list of names."""
    return any(name.startswith(prefix) for prefix in wanted.split(",") for name in names)
