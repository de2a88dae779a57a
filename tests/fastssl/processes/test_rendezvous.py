"""The port of a run: who needs one, and what is said where it is in use."""

import socket
import subprocess
import sys

import pytest

from fastssl.config import RunConfig
from fastssl.errors import ConfigError
from fastssl.processes.rendezvous import _check_run, join
from tests.helpers.processes import ROOT, free_port

JOIN = """
from fastssl.config import RunConfig
from fastssl.processes.rendezvous import join
join("gloo", RunConfig(rendezvous_timeout_s=20))
"""


@pytest.fixture
def taken_port():
    with socket.create_server(("", 0)) as server:
        yield str(server.getsockname()[1])


def launched(monkeypatch, *, rank: int, world_size: int, port: str) -> None:
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    for name, value in found.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def test_a_port_in_use_is_named_with_the_option_that_sets_another(monkeypatch, taken_port):
    launched(monkeypatch, rank=0, world_size=2, port=taken_port)
    with pytest.raises(ConfigError, match=rf"port {taken_port} .* in use, .*deepspeed --master_port \d+, torchrun"):
        join("gloo", RunConfig())


def test_one_process_of_a_launcher_needs_no_port(monkeypatch, taken_port):
    launched(monkeypatch, rank=0, world_size=1, port=taken_port)
    done = subprocess.run([sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_rank_that_finds_another_runs_store_leaves_before_it_writes(monkeypatch):
    import torch.distributed as torch_dist

    port = int(free_port())
    store = torch_dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    launched(monkeypatch, rank=0, world_size=2, port=str(port))
    _check_run(store, RunConfig(dir="runs/a"))
    num_keys = store.num_keys()
    launched(monkeypatch, rank=1, world_size=2, port=str(port))
    _check_run(store, RunConfig(dir="runs/a"))
    with pytest.raises(ConfigError, match=r"run.dir is runs/b, but rank 0 .* trains in runs/a.*--master_port"):
        _check_run(store, RunConfig(dir="runs/b"))
    assert store.num_keys() == num_keys
