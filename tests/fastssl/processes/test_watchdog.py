"""What counts as a lost process, and that a process ends which waits for one."""

import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed as torch_dist

from fastssl.config import RunConfig, build_config
from fastssl.errors import ConfigError
from fastssl.processes.rendezvous import interface_towards, join
from fastssl.processes.watchdog import is_loss, loss_message, probe_connections, reason_of
from tests.helpers.processes import ROOT, environment, free_port

# Of torch 2.13.0, as it came when a process on another host was killed.
RESET = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.77.0.2]:16015: Connection "
    "reset by peer. This is typically caused by a remote worker hanging or bugs in the application. Check the logs."
)
# In the form of gloo's own checks.
MISUSE = (
    "[enforce fail at /__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= "
    "op.nbytes. 16 vs 8"
)

# Two ranks: rank 1 is killed while rank 0 is nowhere near an exchange, as a main thread that waits for its GPU.
WAITING = """
import os, sys, time
from fastssl.config import RunConfig
from fastssl.processes.watchdog import Watchdog
from fastssl.processes.rendezvous import join
cfg = RunConfig(rendezvous_timeout_s=200)
join("gloo", cfg)
with Watchdog() as watchdog:
    watchdog.watch(cfg)
    watchdog.step = lambda: 7
    print("watching", flush=True)
    time.sleep(1000)
"""
# Two ranks that finish at different times, or of which the first fails.
FINISHING = """
import os, time, torch.distributed as torch_dist
from fastssl.config import RunConfig
from fastssl.errors import PeerLostError, print_error
from fastssl.processes.watchdog import Watchdog, exit_now
from fastssl.processes.rendezvous import join
cfg = RunConfig(rendezvous_timeout_s=200)
join("gloo", cfg)
rank = torch_dist.get_rank()
try:
    with Watchdog() as watchdog:
        watchdog.watch(cfg)
        watchdog.step = lambda: 7
        time.sleep(3 * rank)
        torch_dist.barrier()
        if os.environ["FAILS"] == "1":
            print(1 / rank)
            torch_dist.barrier()
except PeerLostError as error:  # as fastssl.cli does
    print_error(str(error))
    exit_now(PeerLostError.exit_code)
"""


def start(program: str, **variables: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    found = environment() | variables | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=found | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_what_is_a_loss():
    assert is_loss(RuntimeError(RESET))
    assert is_loss(torch_dist.DistNetworkError("The client socket has timed out after 20000ms"))
    assert is_loss(torch_dist.DistStoreError("Timed out after 21 seconds waiting for clients. 1/2 clients joined."))
    assert is_loss(torch_dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network"))


def test_what_is_a_mistake():
    assert not is_loss(RuntimeError(MISUSE))
    assert not is_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_loss(torch_dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"))
    assert not is_loss(OSError("Connection reset by peer"))  # of a disk on the network, say


def test_message():
    assert reason_of(RuntimeError(RESET)) == "Read error [10.77.0.2]:16015: Connection reset by peer"
    assert reason_of(RuntimeError("")) == "RuntimeError"
    message = loss_message(RuntimeError(RESET), 12)
    for part in ("after step 12", "rank 0", socket.gethostname(), "run.resume=auto"):
        assert part in message


def test_connections_are_probed():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        probe_connections(30)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
        idle, interval, count = (
            client.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count == 30
        client.sendall(b"still open")


def test_interface():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


@pytest.mark.parametrize("key", ["rendezvous_timeout_s", "peer_timeout_s", "collective_timeout_s"])
@pytest.mark.parametrize("value", [0, 86_401])
def test_timeouts_out_of_range(key, value):
    with pytest.raises(ConfigError, match=rf"run\.{key} must be in \[1, 86400\]"):
        build_config({"run": {key: value}})


@pytest.mark.dist
@pytest.mark.slow
def test_a_process_that_waits_elsewhere_ends_too():
    waiting, killed = start(WAITING)
    try:
        for rank in (waiting, killed):
            assert rank.stdout is not None
            assert rank.stdout.readline() == "watching\n"
        killed.send_signal(signal.SIGKILL)
        _, err = waiting.communicate(timeout=60)
    finally:
        for rank in (waiting, killed):
            rank.kill()
            rank.wait()
    assert waiting.returncode == 4, err
    (line,) = [line for line in err.splitlines() if line.startswith("fastssl: error (rank 0): ")]
    assert "after step 7" in line
    assert "Traceback" not in err


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True], ids=["finishing", "failing"])
def test_ranks_that_finish_at_different_times_or_by_a_mistake(fails):
    ranks = start(FINISHING, FAILS=str(int(fails)))
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    if fails:  # a mistake is not hidden behind a lost process; the others lose the one that made it
        assert "ZeroDivisionError" in said[0]
        assert "fastssl: error (rank 1): lost another process of the run after step 7" in said[1]
        assert "Traceback" not in said[1]
        assert [rank.returncode for rank in ranks] == [1, 4]
    else:
        assert [rank.returncode for rank in ranks] == [0, 0], said
        assert "fastssl: error" not in "".join(said)


def test_half_a_launcher(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"variable RANK is set, but not WORLD_SIZE, .*MASTER_ADDR, MASTER_PORT"):
        join("gloo", RunConfig())
