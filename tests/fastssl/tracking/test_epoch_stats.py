"""What a run writes of its steps: where some or all were not taken, and on any number of processes.

The file is also the program of a rank: `python test_epoch_stats.py RANK WORLD_SIZE FOLDER`.
"""

import math
import sys
from pathlib import Path

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
from tests.helpers.processes import join_ranks, start_ranks
from tests.helpers.runs import losses

STEPS_PER_EPOCH = 3


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def open_stats(folder: RunFolder, on_collapse: str = "warn", *, global_batch_size: int = 4096) -> EpochStats:
    """The window of the diagnostics is one step: a batch is larger than it."""
    data = DataConfig(train="x.beton", global_batch_size=global_batch_size)
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


# Any number of processes


def take_share(stats: EpochStats, steps: range) -> None:
    """This rank's share of steps whose global batches are the same for every number of processes."""
    for step in steps:
        # Of the 512 samples whose pairs are used, the second of two processes has 212 in the first epoch, then none.
        num_samples = 600 if step <= STEPS_PER_EPOCH else 1200
        generator = torch.Generator().manual_seed(step)
        z = torch.randn(num_samples, 8, generator=generator) + 0.2 * torch.randn(2, num_samples, 8, generator=generator)
        views = list(z.chunk(collectives.world_size(), dim=1)[collectives.rank()])
        loss, grad_norm = views[0].mean(), torch.tensor(2.0)
        for name, x in {"loss": loss, "grad_norm": grad_norm, "num_steps": 1.0}.items():
            stats.sums[name] += x
        report = torch.stack((torch.tensor(1.0), loss, grad_norm))
        stats.add_to_window(StepResult(torch.tensor(True), loss, grad_norm, report, views, views), step)


def resume_as_rank(folder: Path) -> None:
    """The last step of an epoch whose sums one process saved: they are the first rank's, and the others start at 0."""
    saved = torch.load(folder / "sums.pt")
    if collectives.rank() > 0:
        saved = {group: {name: torch.zeros_like(x) for name, x in sums.items()} for group, sums in saved.items()}
    stats = open_stats(RunFolder(folder / "resumed"), global_batch_size=1024)
    stats.restore(saved, {}, world_size=1)
    take_share(stats, range(3, 4))
    stats.end_epoch(3, ())
    take_share(stats, range(4, 7))
    stats.end_epoch(6, ())
    stats.close()


@pytest.mark.dist
def test_an_epoch_resumed_by_two_processes_has_the_row_of_one_process(tmp_path):
    """The cut is within the window of the diagnostics, the last two steps of three."""
    whole, resumed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "resumed")
    for run in (whole, resumed):
        run.path.mkdir()
    stats = open_stats(whole, global_batch_size=1024)
    for epoch in range(2):
        take_share(stats, range(3 * epoch + 1, 3 * epoch + 3))
        if epoch == 0:
            torch.save(stats.state(), tmp_path / "sums.pt")
        take_share(stats, range(3 * epoch + 3, 3 * epoch + 4))
        stats.end_epoch(3 * epoch + 3, ())
    stats.close()
    start_ranks(__file__, 2, tmp_path)
    rows, found = losses(whole.path), losses(resumed.path)
    assert [row["step"] for row in found] == [3, 6]
    assert sum(found[0]["negative_counts"]) == 2 * 512 * 511
    assert sum(found[0]["positive_counts"]) == 2 * 512
    for row, expected in zip(found, rows, strict=True):
        assert row.pop("kind") == expected.pop("kind") == "epoch"
        for name in ("positive_counts", "negative_counts"):
            assert row.pop(name) == pytest.approx(expected.pop(name), abs=2), name  # pairs at the edge of a bin
        assert row == pytest.approx(expected, rel=1e-4)  # fp32 sums in another order


if __name__ == "__main__":
    rank, shared = int(sys.argv[1]), Path(sys.argv[3])
    join_ranks(rank, int(sys.argv[2]), shared)
    resume_as_rank(shared)
    torch.save(None, shared / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
