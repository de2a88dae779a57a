"""Trainings that a cluster asks to leave: a checkpoint at the next step, exit 0, and on from there."""

import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastssl.checkpoint.save_load import last_checkpoint
from fastssl.tracking.writers import read_rows
from tests.helpers.processes import ROOT, environment, start_training
from tests.helpers.runs import assert_same_end
from tests.integration.test_training import TRAIN, deepspeed, run_of, torchrun

pytestmark = pytest.mark.slow

LAUNCHERS = [(torchrun, 1), (deepspeed, -signal.SIGTERM)]  # and their exit codes after a SIGTERM


def start(command):
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def start_until_step(command, run, *, step):
    """A training that has logged `step`."""
    process = start(command)
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_rows(run / "metrics.jsonl")):
        assert process.poll() is None, "the run ended before it was asked to"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_at_a_checkpoint_and_it_goes_on_bit_for_bit(number, tiny_config, command):
    run, whole = run_of(tiny_config), tiny_config.parent / "whole"
    settings = ["--set", "train.num_epochs=6"]
    process = start_until_step([*TRAIN, str(tiny_config), *settings], run, step=14)
    for _ in range(3):  # a scheduler signals all, and a launcher forwards
        process.send_signal(number)
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    last = out.splitlines()[-1]
    step = read_rows(run / "metrics.jsonl")[-1]["step"]
    assert step < 60, "the run was complete before the signal came"
    assert last.startswith(f"fastssl: asked to stop ({number.name}): {run} goes on after step {step} of 60 with --set")
    assert last_checkpoint(run / "checkpoints") == run / f"checkpoints/step_{step:08d}"
    assert f"goes on after step {step}" in (run / "preempted").read_text()

    resumed = command(*TRAIN, tiny_config, *settings, "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at step {step}" in resumed.stdout
    assert not (run / "preempted").exists()
    assert command(*TRAIN, tiny_config, *settings, f"run.dir={whole}").returncode == 0
    assert_same_end(whole, run)


def test_usr1_while_a_training_starts_ends_it_after_its_first_step(tiny_config):
    run = run_of(tiny_config)
    process = subprocess.Popen(
        [*TRAIN, str(tiny_config)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not listens(process.pid, signal.SIGUSR1):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "goes on after step 1 of 20" in out
    assert last_checkpoint(run / "checkpoints") == run / "checkpoints/step_00000001"
    assert (run / "preempted").exists()


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles a signal itself, as the kernel says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.dist
def test_one_rank_that_is_asked_takes_the_other_along(tiny_config, command):
    """The signal reaches one process only; both leave after the same step."""
    import psutil

    run = run_of(tiny_config)
    settings = ["--set", "train.num_epochs=12"]
    process = start_until_step([*torchrun(2), str(tiny_config), *settings], run, step=14)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "fastssl/train.py" in " ".join(child.cmdline()) and child.environ().get("RANK")
    ]
    assert len(ranks) == 2
    next(child for child in ranks if child.environ()["RANK"] == "1").send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "asked to stop (another rank was)" in out
    assert "asked to stop (SIGUSR1)" in out
    rows = read_rows(run / "metrics.jsonl")
    assert rows[-1]["step"] < 120
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    assert all(0 < row["communication_ms_per_step"] < 10_000 for row in epochs)
    resumed = command(*torchrun(2), tiny_config, *settings, "run.resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "kind" not in row] == list(range(1, 121))


@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("launcher", "code"), LAUNCHERS, ids=["torchrun", "deepspeed"])
def test_a_launcher_and_its_ranks_are_signalled_twice(launcher, code, tiny_config, tmp_path):
    """As a scheduler does: SIGTERM to every process of the job, again 50 ms later, and the launcher passes both on."""
    import psutil

    run, settings = run_of(tiny_config), ["--set", "train.num_epochs=12"]
    process = start_until_step([*launcher(2), str(tiny_config), *settings], run, step=14)
    parent = psutil.Process(process.pid)
    job = [parent, *parent.children(recursive=True)]
    assert sum(each.environ().get("RANK") is not None for each in job) == 2
    for _ in range(2):
        for each in job:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=120)  # until the last rank has closed its output
    assert process.returncode == code  # docs/cluster.md
    assert out.count("fastssl: asked to stop (SIGTERM)") == 2
    assert (run / "preempted").exists()
    step = read_rows(run / "metrics.jsonl")[-1]["step"]
    assert step < 120, "the run was complete before the signal came"
    assert last_checkpoint(run / "checkpoints") == run / f"checkpoints/step_{step:08d}"

    whole = tmp_path / "whole"
    for setting in ("run.resume=auto", f"run.dir={whole}"):
        arguments = ["--cfg", str(tiny_config), *settings, setting]
        ranks = start_training(arguments, num_ranks=2, log=tmp_path / "log.txt")
        for rank in ranks:
            rank.join(timeout=240)
        assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "log.txt").read_text()
    assert f"resumed at step {step}" in (tmp_path / "log.txt").read_text()
    assert_same_end(whole, run)
