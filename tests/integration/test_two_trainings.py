"""Two real trainings on one machine at the same time, started with the same port."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, environment, free_port


@pytest.mark.slow
def test_two_trainings_of_one_process_want_no_common_port(tiny_config, tmp_path):
    """Both are started by deepspeed with the same port, at which a third program listens."""
    with socket.create_server(("", 0)) as taken:
        launcher = ["deepspeed", "--quiet", "--num_gpus", "1", "--master_port", str(taken.getsockname()[1])]
        runs = [tmp_path / "a", tmp_path / "b"]
        trainings = [_start([*launcher, "fastssl/train.py", "--cfg", str(tiny_config)], run) for run in runs]
        started = time.monotonic()
        for training in trainings:
            _, said = training.communicate(timeout=280 - (time.monotonic() - started))
            assert training.returncode == 0, said
    assert all((run / "checkpoints" / "step_00000020").is_dir() for run in runs)


@pytest.mark.slow
def test_two_trainings_of_two_processes_at_one_port(tiny_config, tmp_path):
    """The first is not disturbed; the second ends with a line that says how to choose another port."""
    launcher = ["deepspeed", "--quiet", "--num_gpus", "2", "--master_port", free_port(), "fastssl/train.py"]
    command, metrics = [*launcher, "--cfg", str(tiny_config)], tmp_path / "a" / "metrics.jsonl"
    first = _start(command, tmp_path / "a", "train.num_epochs=100000")
    try:
        while not metrics.exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
        second = _start(command, tmp_path / "b")
        _, said = second.communicate(timeout=200)
        assert second.returncode == 2, said
        assert "in use" in said
        assert "deepspeed --master_port" in said
        assert "Traceback" not in said
        assert not (tmp_path / "b").exists()
        num_bytes = metrics.stat().st_size
        while metrics.stat().st_size == num_bytes:  # it goes on
            assert first.poll() is None, first.communicate()
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # the launchers and both ranks
        first.communicate(timeout=60)


def _start(command: list[str], run: Path, *others: str) -> subprocess.Popen[str]:
    settings = ["--set", f"run.dir={run}", *others]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *settings], cwd=ROOT, env=environment(), start_new_session=True, **pipes)
