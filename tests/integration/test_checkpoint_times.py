"""Two ranks whose clocks differ save after the same steps: those of the first rank's clock."""

import json
from pathlib import Path

import pytest

from fastssl.checkpoint.save_load import step_of
from tests.helpers.processes import forkserver, free_port, train_as_rank
from tests.integration.test_training import run_of

# Seconds of a step by each rank's clock. By that of rank 1 a checkpoint would fall due at every step.
STEP_S = {0: 60.0, 1: 7200.0}


def _train(arguments: list[str], rank: int, port: str, folder: Path) -> None:
    """A rank whose clock moves with its steps, and which notes when it saves."""
    from fastssl import trainer

    now_s = 0.0
    saved: list[int] = []
    take_step, save, rule = trainer.Trainer.take_step, trainer.Trainer.save, trainer.CheckpointRule

    def timed_step(self, batch):
        nonlocal now_s
        now_s += STEP_S[rank]
        take_step(self, batch)

    def noted_save(self):
        saved.append(self.step)
        (folder / f"saved_{rank}.json").write_text(json.dumps(saved))
        save(self)

    def rule_with_clock(cfg, **lengths):
        return rule(cfg, **lengths, clock=lambda: now_s)

    trainer.Trainer.take_step, trainer.Trainer.save = timed_step, noted_save
    trainer.CheckpointRule = rule_with_clock
    train_as_rank(arguments, rank, 2, port, folder / "log.txt")


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_whose_clocks_differ_save_after_the_same_steps(tiny_config, tmp_path):
    settings = ["run.checkpoint_every_epochs=null", "run.checkpoint_every_minutes=4"]
    arguments, port = ["--cfg", str(tiny_config), "--set", *settings], free_port()
    ranks = [forkserver().Process(target=_train, args=(arguments, rank, port, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "log.txt").read_text()
    # Epochs of ten steps. In mid-epoch a checkpoint falls due after five minutes and is saved a step later, at the end
    # of the epoch after four.
    for rank in range(2):
        assert json.loads((tmp_path / f"saved_{rank}.json").read_text()) == [6, 10, 16, 20]
    checkpoints = run_of(tiny_config) / "checkpoints"
    assert sorted(map(step_of, checkpoints.glob("step_*"))) == [16, 20]
