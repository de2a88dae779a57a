"""Micro-batches and batch norm over ranks in the real trainer, under each of DeepSpeed's ZeRO stages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import ROOT, environment, free_port

NUM_STEPS = 3
# One start of the processes for several runs: most of a tiny run's seconds are imports.
PROGRAM = """
import json, sys
from itertools import islice
import torch
from fastssl import collectives
from fastssl.tracking import plots
from fastssl.config import load_config
from fastssl.trainer import start_alone

plots.draw_views = lambda *_: None  # a second each
config, folder, num_steps, runs = sys.argv[1:]

def weights(trainer):
    return {name: x.detach().double().clone() for name, x in trainer.objective.named_parameters() if x.requires_grad}

for name, settings in json.loads(runs).items():
    trainer = start_alone(load_config(config, [f"run.dir={folder}/{name}", *settings]))
    start = weights(trainer)
    batches = trainer.loader.epoch(0)
    trainer.epoch_stats.timer.start()
    trainer.fit_batches(islice(batches, int(num_steps)))
    batches.close()
    trainer.save()
    if collectives.rank() == 0:
        torch.save({"start": start, "end": weights(trainer)}, f"{folder}/{name}.pt")
"""


def run(config: Path, num_ranks: int, runs: dict[str, list[str]]) -> dict[str, dict]:
    """Weights at the start and the end of each run."""
    folder = config.parent / f"{num_ranks}_ranks"
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    torch_run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
    done = subprocess.run(
        [*torch_run, f"--master_port={free_port()}", program, config, folder, str(NUM_STEPS), json.dumps(runs)],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: torch.load(folder / f"{name}.pt") | {"stderr": done.stderr} for name in runs}


def distance(found: dict, expected: dict) -> float:
    """Of the weights that two runs end with, as a fraction of the way that the second one went."""
    assert found["end"].keys() == expected["end"].keys()
    apart = sum(float((found["end"][name] - value).square().sum()) for name, value in expected["end"].items())
    moved = sum(float((expected["start"][name] - value).square().sum()) for name, value in expected["end"].items())
    return (apart / moved) ** 0.5


WITHOUT_BATCH_NORM = [
    "model.backbone_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1], norm_layer: groupnorm1}",
    "model.projector_hidden=[]",
    "model.projector_last_norm=false",
    "loss={name: siglip}",  # it learns a temperature
    "optim.warmup_epochs=0",
]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_micro_batches_train_as_the_whole_batch_under_every_zero_stage(num_ranks: int, tiny_config: Path) -> None:
    settings = {
        "zero0": ["train.zero_stage=0"],
        "zero1": ["train.zero_stage=1"],
        "zero2": ["train.zero_stage=2"],
        "zero0_clipped": ["train.zero_stage=0", "train.grad_clip_norm=0.1"],
        "zero2_clipped": ["train.zero_stage=2", "train.grad_clip_norm=0.1"],
        "zero1_bf16": ["train.zero_stage=1", "train.precision=bf16"],
    }
    runs = {
        f"{name}_{num}": [*WITHOUT_BATCH_NORM, *keys, f"train.num_micro_batches={num}"]
        for name, keys in settings.items()
        for num in (1, 4)
    }
    found = run(tiny_config, num_ranks, runs)
    for name in settings:
        whole, parts = found[f"{name}_1"], found[f"{name}_4"]
        assert "loss.log_inv_temperature" in whole["end"]
        # fp32: rounding of the sums over a batch. bf16: 8 bits of the activations.
        assert distance(parts, whole) < (0.1 if "bf16" in name else 1e-4), name
    assert distance(found["zero0_clipped_1"], found["zero0_1"]) > 0.1  # that clipping does something


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_with_sync_batch_norm_begin_as_one(tiny_config: Path) -> None:
    keys = ["optim.warmup_epochs=0", "loss={name: byol, predictor_hidden: 8, target_momentum: 0.9}"]
    sync = ["model.batch_norm=sync"]
    run(tiny_config, 1, {"alone": [*keys, *sync]})
    run(
        tiny_config,
        2,
        {
            "per_rank": keys,
            "zero0": [*keys, *sync],
            "zero2": [*keys, *sync, "train.zero_stage=2", "model.activation_checkpointing=true"],
        },
    )
    expected = first_row(tiny_config, "1_ranks/alone")
    for name in ("zero0", "zero2"):
        found = first_row(tiny_config, f"2_ranks/{name}")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        # fp32 through batch norms and ReLUs; tests/fastssl/models/test_sync_batch_norm.py holds fp64 to 1e-9.
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-5)
    assert first_row(tiny_config, "2_ranks/per_rank")["loss"] != pytest.approx(expected["loss"], rel=1e-4)


def first_row(config: Path, folder: str) -> dict:
    return json.loads((config.parent / folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
def test_a_compiled_run_is_the_same_but_for_rounding_and_its_weights_have_their_names(tiny_config: Path) -> None:
    keys = ["train.zero_stage=2", "train.num_micro_batches=2", "optim.warmup_epochs=0"]
    # Rounding grows by batch norm over images that are mostly black, until three steps are no measure of anything.
    smooth = [*WITHOUT_BATCH_NORM, *keys]
    runs = {"plain": keys, "compiled": [*keys, "train.compile=true"]}
    runs |= {"smooth": smooth, "smooth_compiled": [*smooth, "train.compile=true"]}
    found = run(tiny_config, 1, runs)
    assert found["plain"]["stderr"].count("train.num_micro_batches=2: batch norm") == 2  # of those with batch norm
    assert distance(found["smooth_compiled"], found["smooth"]) < 1e-4
    folder = tiny_config.parent / "1_ranks"
    plain, compiled = (
        torch.load(folder / name / f"checkpoints/step_{NUM_STEPS:08d}/weights.pt", weights_only=True)
        for name in ("plain", "compiled")
    )
    assert list(compiled["backbone"]) == list(plain["backbone"])
