"""kNN on held-out images while a run trains: ranks as one, the same number as `fastssl eval`, the best one kept.

The file is also the program of a rank: `python test_held_out.py RANK WORLD_SIZE FOLDER`.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.held_out import HeldOutKnn
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import best_held_out, read_rows
from pipelines.beton import BetonReader
from pipelines.loader import DataConfig
from pipelines.views import ViewsConfig
from tests.helpers.processes import join_ranks, start_ranks
from tests.helpers.runs import losses

CPU = torch.device("cpu")


def judge(train: Path, **settings) -> HeldOutKnn:
    data = DataConfig(train=str(train), holdout_fraction=0.1)
    cfg = EvalConfig(**{"knn_k": 5} | settings)
    return HeldOutKnn(cfg, data, ViewsConfig(recipe="digits", size_px=16), BetonReader(train), CPU)


def encoder(shift: float) -> nn.Sequential:
    """Two channels' means over 4 x 4 parts, and a batch norm whose running mean is `shift`; in training mode."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    layers[1].running_mean.fill_(shift)
    return layers


def test_ranks_with_buffers_of_their_own_agree_with_one_process(digits, tmp_path):
    (tmp_path / "train.beton").symlink_to(digits / "train.beton")
    alone = judge(digits / "train.beton").top1(encoder(0.5))
    assert 0.3 < alone < 1
    assert judge(digits / "train.beton").top1(encoder(3.0)) != alone  # the buffers matter
    for top1, shift, is_training in start_ranks(__file__, 2, tmp_path):
        assert top1 == alone
        assert shift in (0.25, 0.75)  # each rank has its own again
        assert is_training


def test_more_neighbours_than_images_are_bounded(digits, capfd):
    few = judge(digits / "train.beton", knn_k=5000)
    assert 0 < few.top1(encoder(0.5)) < 1
    assert "kNN: k = 1,16" in capfd.readouterr().err  # bounded by the 1,167 or so images that vote


def test_the_best_epoch_is_the_first_of_equals(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert best_held_out(path) is None
    rows = [(10, 0.4), (20, 0.6), (30, 0.6), (40, 0.5)]
    lines = [f'{{"kind": "held_out", "step": {step}, "epoch": 0, "knn_top1": {top1}}}' for step, top1 in rows]
    path.write_text("\n".join(['{"step": 9, "loss": 1.0}', *lines]) + "\n")
    assert best_held_out(path) == (20, 0.6)


@pytest.mark.slow
def test_a_run_keeps_the_best_checkpoint_and_eval_judges_it_beside_the_last(tiny_config, command):
    """The learning rate grows until it does harm, so that the last epoch is not the best."""
    settings = [
        "train.num_epochs=6",
        "optim.warmup_epochs=5",
        "optim.base_lr=1000",
        "eval.every_epochs=1",
        "eval.what=[knn]",
    ]
    train = ["fastssl", "train", "--cfg", tiny_config, "--set", *settings]
    assert command(*train, "train.on_collapse=warn").returncode == 0
    run = RunFolder(tiny_config.parent / "run")
    rows = [row for row in read_rows(run.metrics) if row.get("kind") == "held_out"]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4, 5]
    step, top1 = best_held_out(run.metrics) or (0, 0.0)
    assert step < rows[-2]["step"], "the best epoch must be none of the two that are kept anyway"
    assert (run.checkpoints / f"step_{step:08d}").is_dir()
    done = command("fastssl", "eval", run.path, "--set", "data.test=null", "eval.baselines=false")
    assert done.returncode == 0, done.stderr
    found = {line["encoder"]: (line["checkpoint_step"], line["top1"]) for line in read_rows(run.evaluations)}
    assert found["best pre-trained encoder"] == (step, pytest.approx(top1))
    assert found["pre-trained encoder"] == (rows[-1]["step"], pytest.approx(rows[-1]["knn_top1"]))
    assert "best pre-trained encoder" in done.stdout

    other = tiny_config.parent / "other"
    assert command(*train, f"run.dir={other}", "eval.every_epochs=0").returncode == 0
    assert losses(other) == [row for row in losses(run.path) if row.get("kind") != "held_out"]


if __name__ == "__main__":
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    join_ranks(rank, world_size, folder)
    layers = encoder(0.25 + 0.5 * rank)  # the mean over both ranks is 0.5
    found = judge(folder / "train.beton").top1(layers)
    torch.save((found, layers[1].running_mean[0].item(), layers.training), folder / f"rank{rank}.pt")
