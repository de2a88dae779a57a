"""What a run writes of its steps, where some or all of them were not taken."""

import math

import pytest
import torch

from fastssl import collectives
from fastssl.config import Config, TrainConfig
from fastssl.errors import DivergedError
from fastssl.step.late_reports import StepReport
from fastssl.step.train_step import StepResult
from fastssl.tracking.epoch_stats import EpochStats
from fastssl.tracking.representation import COLLAPSE_THRESHOLDS
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.loader import DataConfig

STEPS_PER_EPOCH = 3


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def open_stats(folder: RunFolder, on_collapse: str = "warn") -> EpochStats:
    """The window of the diagnostics is one step: a batch is larger than it."""
    data = DataConfig(train="x.beton", global_batch_size=4096)
    cfg = Config(data=data, train=TrainConfig(on_collapse=on_collapse))
    stats = EpochStats(
        cfg,
        torch.device("cpu"),
        steps_per_epoch=STEPS_PER_EPOCH,
        num_views=2,
        flops_per_image=None,
        bound_nats=lambda loss: 1 - loss,
    )
    stats.open(folder, 0)
    stats.timer.start()
    return stats


def take_epoch(stats: EpochStats, epoch: int, *, losses: list[float | None], spread: float = 1.0) -> None:
    """An epoch of steps with these losses; None: a skipped one."""
    generator = torch.Generator().manual_seed(epoch)
    for step, loss in enumerate(losses, epoch * STEPS_PER_EPOCH + 1):
        taken = loss is not None
        z = 1 + spread * torch.randn(16, 8, generator=generator) if taken else torch.full((16, 8), torch.nan)
        value = torch.tensor(math.nan if loss is None else loss)
        grad_norm = torch.tensor(2.0)
        if taken:  # what `TrainStep` adds
            for name, x in {"loss": value, "grad_norm": grad_norm, "num_steps": 1.0}.items():
                stats.sums[name] += x
        report = torch.stack((torch.tensor(float(taken)), value, grad_norm))
        stats.add_to_window(StepResult(torch.tensor(taken), value, grad_norm, report, [z, z], [z, z]), step)
        stats.advance()
        settings = {"learning_rate": 0.1, **stats.speed_of_steps(step)}
        stats.write_step(
            StepReport(
                step=step,
                taken=taken,
                loss=float(value),
                grad_norm=2.0,
                must_stop=False,
                must_save=False,
                is_searching=False,
                sample_ids=torch.arange(16),
                settings=settings,
            )
        )
    stats.end_epoch(step, bad_samples=())


def test_repeated_requests_are_counted_by_reason_and_shown_when_they_rise(folder, capsys):
    stats = open_stats(folder)
    for step, retries in (
        (3, {}),
        (6, {"no connection": 2, "status 503": 5}),
        (9, {"no connection": 2, "status 503": 5}),
    ):
        stats.end_epoch(step, (), retries)
    stats.end_epoch(12, (), {"no connection": 3, "status 503": 5})
    rows = epochs_of(folder)
    assert [row.get("remote_retries") for row in rows] == [
        None,
        *[{"status 503": 5, "no connection": 2}] * 2,
        {"status 503": 5, "no connection": 3},
    ]
    lines = [line for line in capsys.readouterr().err.splitlines() if "remote requests" in line]
    assert lines == [
        "fastssl: 7 remote requests of this epoch were repeated: 5 x status 503, 2 x no connection",
        "fastssl: 1 remote requests of this epoch were repeated: 1 x no connection",
    ]


def test_a_bad_sample_counts_once_whichever_rank_found_it_and_whenever(folder, tmp_path, monkeypatch):
    """Two ranks, the other of which has found 3 and 9, and a run that is resumed."""
    stats = open_stats(folder)
    stats.end_epoch(3, ())
    monkeypatch.setattr(collectives, "gather_on_first", lambda own: [own, [3, 9]])
    stats.end_epoch(6, [3, 7])
    saved = stats.all_bad_samples([3, 7, 8])
    assert saved == [3, 7, 8, 9]
    monkeypatch.setattr(collectives, "gather_on_first", lambda own: [own, [5]])
    (tmp_path / "resumed").mkdir()
    resumed = open_stats(RunFolder(tmp_path / "resumed"))
    resumed.restore(stats.state(), {}, 1, bad_samples=saved)
    resumed.end_epoch(9, [7])
    seen = [row.get("bad_samples_seen") for run in (folder, RunFolder(tmp_path / "resumed")) for row in epochs_of(run)]
    assert seen == [None, 3, 5]


def epochs_of(folder: RunFolder) -> list[dict]:
    return [row for row in read_rows(folder.metrics) if row.get("kind") == "epoch"]


def test_an_epoch_is_the_mean_of_the_steps_that_were_taken(folder, capsys):
    stats = open_stats(folder)
    take_epoch(stats, 0, losses=[1.0, None, 2.0])
    stats.close()
    (row,) = epochs_of(folder)
    assert (row["loss"], row["grad_norm"], row["skipped_steps"]) == (1.5, 2.0, 1)
    assert row["mutual_information_bound_nats"] == -0.5
    assert row["rankme_z"] > 2
    assert "loss 1.5000" in capsys.readouterr().out


def test_an_epoch_whose_last_steps_were_skipped_has_no_diagnostics(folder):
    stats = open_stats(folder)
    take_epoch(stats, 0, losses=[1.0, 2.0, None])
    take_epoch(stats, 1, losses=[1.0, None, 3.0])
    stats.close()
    without, with_them = epochs_of(folder)
    assert without["loss"] == 1.5
    assert not set(COLLAPSE_THRESHOLDS) & set(without)
    assert set(COLLAPSE_THRESHOLDS) <= set(with_them)


def test_an_epoch_of_skipped_steps_has_no_loss(folder, capsys):
    stats = open_stats(folder)
    take_epoch(stats, 0, losses=[None] * STEPS_PER_EPOCH)
    stats.close()
    (row,) = epochs_of(folder)
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["skipped_steps"] == STEPS_PER_EPOCH
    assert "mutual_information_bound_nats" not in row
    assert "loss skipped" in capsys.readouterr().out


def test_a_collapse_is_told_over_an_epoch_without_diagnostics(folder):
    stats = open_stats(folder, on_collapse="stop")
    take_epoch(stats, 0, losses=[1.0] * 3, spread=1e-6)
    take_epoch(stats, 1, losses=[1.0, 1.0, None])
    with pytest.raises(DivergedError, match="collapsed at step 9"):
        take_epoch(stats, 2, losses=[1.0] * 3, spread=1e-6)
    stats.close()
