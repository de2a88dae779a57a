"""Trainings in which the gradient of chosen steps is made NaN: what becomes of checkpoints, signals and notes."""

import os
import signal
from pathlib import Path

import pytest

from fastssl.checkpoint.save_load import last_checkpoint, step_of
from fastssl.tracking.writers import read_rows
from tests.helpers.processes import forkserver, train_in_this_process
from tests.integration.test_training import run_of

pytestmark = pytest.mark.slow


def train_with_bad_steps(
    arguments: list[str], bad_steps: list[int], signals: dict[int, int], log: Path, exit_code: int = 0
) -> str:
    """`fastssl train ARGUMENTS` with a NaN in the gradient of these steps (1-based), and signals to itself in steps."""
    process = forkserver().Process(target=_train, args=(arguments, bad_steps, signals, log))
    process.start()
    process.join(240)
    assert process.exitcode == exit_code, log.read_text()
    return log.read_text()


def _train(arguments: list[str], bad_steps: list[int], signals: dict[int, int], log: Path) -> None:
    import torch

    from fastssl.step.device_update import DeviceUpdate
    from fastssl.trainer import Trainer

    take, backward = Trainer.take_step, DeviceUpdate.backward
    step = 0

    def noted_step(trainer, batch):
        nonlocal step
        step = trainer.step + 1
        if step in signals:
            os.kill(os.getpid(), signals[step])
        return take(trainer, batch)

    def bad_backward(update, loss):
        backward(update, loss * (torch.nan if step in bad_steps else 1))

    Trainer.take_step, DeviceUpdate.backward = noted_step, bad_backward
    train_in_this_process(arguments, log)


def arguments_of(tiny_config: Path, *settings: str) -> list[str]:
    return ["--cfg", str(tiny_config), "--set", "run.log_every_steps=1", *settings]


def steps_of_checkpoints(run: Path) -> list[int]:
    return sorted(map(step_of, (run / "checkpoints").glob("step_*")))


def test_a_checkpoint_that_falls_due_in_a_skipped_step_is_saved_after_the_next_one(tiny_config, tmp_path):
    arguments = arguments_of(tiny_config, "run.checkpoint_every_steps=7", "run.keep_every_epochs=1")
    train_with_bad_steps(arguments, [7, 10, 11], {}, tmp_path / "log.txt")  # epochs end with steps 10 and 20
    assert steps_of_checkpoints(run_of(tiny_config))[-2:] == [14, 20]
    rows = [row for row in read_rows(run_of(tiny_config) / "metrics.jsonl") if row.get("kind") == "epoch"]
    assert [row["skipped_steps"] for row in rows] == [2, 1]


def test_a_signal_while_steps_are_skipped_ends_the_run_after_the_next_one(tiny_config, tmp_path):
    arguments = arguments_of(tiny_config, "run.checkpoint_every_epochs=100", "run.resume=auto")
    said = train_with_bad_steps(arguments, [3, 4, 5], {4: signal.SIGTERM}, tmp_path / "log.txt")
    assert "goes on after step 6 of 20" in said
    assert last_checkpoint(run_of(tiny_config) / "checkpoints") == run_of(tiny_config) / "checkpoints/step_00000006"
    said = train_with_bad_steps(arguments, [], {}, tmp_path / "log.txt")
    assert "resumed at step 6" in said
    assert [row["step"] for row in read_rows(run_of(tiny_config) / "nonfinite.jsonl")] == [3, 4, 5]


def test_a_run_that_begins_again_notes_its_skipped_steps_once(tiny_config, tmp_path):
    arguments = arguments_of(tiny_config, "run.checkpoint_every_epochs=100", "run.resume=auto")
    train_with_bad_steps(arguments, [2, 3], {5: signal.SIGKILL}, tmp_path / "log.txt", exit_code=-signal.SIGKILL)
    assert last_checkpoint(run_of(tiny_config) / "checkpoints") is None
    train_with_bad_steps(arguments, [2, 3], {}, tmp_path / "log.txt")
    assert [row["step"] for row in read_rows(run_of(tiny_config) / "nonfinite.jsonl")] == [2, 3]
