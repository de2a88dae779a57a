"""A run goes on with another number of processes and under another ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import start_training
from tests.helpers.runs import collect, final_state, losses

# Nothing of the network may depend on how a batch is divided: no batch norm. The target, Lambda and the predictor-less
# loss of MINC are what most has to be remembered for.
VIT = "model={backbone: timm/vit_tiny_patch16_224, projector_hidden: [], projector_last_norm: false,"
VIT += " backbone_kwargs: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}"
SETTINGS = [VIT, "loss={name: minc, target_momentum: 0.9}", "optim={base_lr: 0.05, warmup_epochs: 0.5}"]
CUT, END = 7, 10  # steps, of two epochs of five: the cut is in mid-epoch
GLOBAL_BATCH_SIZE = 256
# fp32: summing the 256 rows of a batch in another order moves a gradient by about sqrt(256) * 2^-24 of its terms, in
# each of the three steps; a gradient is a sum of terms that cancel to about a tenth.
TOLERANCE = 10 * (END - CUT) * GLOBAL_BATCH_SIZE**0.5 * 2.0**-24
FIGURES = ("loss", "grad_norm", "skipped_steps", "online_top1", "std_z", "positive_similarity", "negative_similarity")


def train(config: Path, run: Path, *settings: str, num_ranks: int) -> str:
    log = run.with_suffix(".txt")
    arguments = ["--cfg", str(config), "--set", *SETTINGS, f"data.global_batch_size={GLOBAL_BATCH_SIZE}"]
    arguments += [f"run.dir={run}", f"run.checkpoint_every_steps={CUT}", *settings]
    ranks = start_training(arguments, num_ranks=num_ranks, log=log)
    for rank in ranks:
        rank.join(250)
    assert [rank.exitcode for rank in ranks] == [0] * num_ranks, log.read_text()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_from_two_processes_to_one_and_to_four(tiny_config, tmp_path):
    whole = tmp_path / "whole"
    train(tiny_config, whole, "train.zero_stage=1", num_ranks=2)
    at_cut = torch.load(whole / f"checkpoints/step_{CUT:08d}/state.pt", weights_only=True)["engine"]
    end = final_state(whole)
    for num_ranks, zero_stage in ((1, 0), (4, 2)):
        run = tmp_path / f"{num_ranks}"
        shutil.copytree(whole, run)
        shutil.rmtree(run / f"checkpoints/step_{END:08d}")
        said = train(tiny_config, run, "run.resume=auto", f"train.zero_stage={zero_stage}", num_ranks=num_ranks)
        assert f"resumed at step {CUT}" in said
        manifest = json.loads((run / f"checkpoints/step_{END:08d}/manifest.json").read_text())
        assert manifest["world_size"] == num_ranks
        assert_near(at_cut, end, final_state(run))
        assert_same_rows(losses(whole), losses(run))


def assert_near(at_cut: dict, end: dict, resumed: dict) -> None:
    """Weights, target, moment and momentum are the unbroken run's within rounding, in terms of how far they moved."""
    parts = {
        "weights": [f"parameters/{name}" for name in at_cut["optimizer"]],
        "target": [f"parameters/{name}" for name in at_cut["parameters"] if name.startswith("target.")],
        "moment": [f"buffers/{name}" for name in at_cut["buffers"]],
        "momentum": [f"optimizer/{name}/momentum_buffer" for name in at_cut["optimizer"]],
    }
    before: dict = {}
    collect(at_cut, "engine", before)
    for part, names in parts.items():
        start, a, b = (flat(state, names) for state in (before, end, resumed))
        moved, apart = (a - start).norm(), (a - b).norm()
        print(f"{part}: {apart / moved:.1e} of the distance from the cut, tolerance {TOLERANCE:.1e}")
        assert moved > 1e-3 * a.norm(), part
        assert apart <= TOLERANCE * moved, part
    assert resumed["state.pt/step"] == end["state.pt/step"] == END


def flat(state: dict, names: list[str]) -> torch.Tensor:
    prefix = "state.pt/" if "state.pt/step" in state else ""
    return torch.cat([state[f"{prefix}engine/{name}"].flatten().double() for name in names])


def assert_same_rows(rows: list[dict], resumed: list[dict]) -> None:
    assert [(row["step"], row.get("kind")) for row in resumed] == [(row["step"], row.get("kind")) for row in rows]
    for row, other in zip(rows, resumed, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)  # so each global batch held the same images
    for name in FIGURES:
        assert resumed[-1][name] == pytest.approx(rows[-1][name], rel=1e-5), name
    assert sum(resumed[-1]["positive_counts"]) == sum(rows[-1]["positive_counts"]) == 5 * GLOBAL_BATCH_SIZE
    num_negative = 5 * GLOBAL_BATCH_SIZE * (GLOBAL_BATCH_SIZE - 1)
    assert sum(resumed[-1]["negative_counts"]) == sum(rows[-1]["negative_counts"]) == num_negative
