"""Every loss trains from a config; what it learns and remembers is trained, saved and resumed with the rest."""

import json
import math
from pathlib import Path

import pytest

from fastssl.losses import LOSSES
from tests.helpers.processes import run_program_forked

NUM_STEPS = 4
SAVED_AT = 2

# One process for several runs: a Trainer joins a process group, and most of a tiny run's seconds are imports.
BEGIN = """
import json, sys
from itertools import islice
import torch
from fastssl.tracking import plots
from fastssl.config import load_config
from fastssl.trainer import start_alone

plots.draw_views = lambda *_: None  # a second each
config, folder = sys.argv[1:3]

def start(name, run, *settings):
    return start_alone(load_config(config, [f"loss={{name: {name}}}", f"run.dir={folder}/{run}", *settings]))

def take_steps(trainer, num_steps):
    batches = trainer.loader.epoch(0, first_batch=trainer.step)
    trainer.epoch_stats.timer.start()
    trainer.fit_batches(islice(batches, num_steps))
    batches.close()
    return state(trainer)

def state(trainer):
    learned = {name: x.double().flatten().tolist() for name, x in trainer.loss.named_parameters()}
    weight = next(trainer.model.parameters()).double().flatten().tolist()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # inside of ZeRO's
    moments = [x["momentum_buffer"].double().sum().item() for x in optimizer.state.values()]
    target = [] if trainer.objective.target is None else list(trainer.objective.target.parameters())
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in target)
    return {
        "learned": learned, "weight": weight, "moments": moments, "step": trainer.step,
        "target": [x.double().sum().item() for x in target],
        "remembered": {name: x.double().flatten().tolist() for name, x in trainer.loss.named_buffers()},
        "probe": [x.double().sum().item() for x in trainer.probe.parameters()],
    }
"""

RESUME = """
name, settings = sys.argv[5], sys.argv[6:]
whole = start(name, "whole", *settings)
found = {"start": state(whole), "end": take_steps(whole, int(sys.argv[3]))}
cut = start(name, "cut", *settings)
found["saved"] = take_steps(cut, int(sys.argv[4]))
cut.save()
again = start(name, "cut", *settings, "run.resume=auto")
found["restored"] = state(again)
found["resumed_end"] = take_steps(again, int(sys.argv[3]) - again.step)
print(json.dumps(found))
"""

OTHERS = """
found = {}
settings = sys.argv[4].split()
crops = "views.specs=[{size_px: 16}, {size_px: 16}, {size_px: 8, crop_scale: [.05, .2]}]"
for name in sys.argv[5:]:
    loss, _, has_crops = name.partition("-")
    trainer = start(loss, name, *settings, *([crops] if has_crops else []))
    found[name] = {"start": state(trainer), "end": take_steps(trainer, int(sys.argv[3]))}
print(json.dumps(found))
"""


def run(program: str, config: Path, folder: Path, *arguments: object) -> dict:
    done = run_program_forked(BEGIN + program, [str(config), str(folder), *map(str, arguments)], folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_what_siglip_learns_is_trained_and_resumed_bit_for_bit(tiny_config: Path, tmp_path: Path) -> None:
    found = run(RESUME, tiny_config, tmp_path, NUM_STEPS, SAVED_AT, "siglip")
    start, end = found["start"]["learned"], found["end"]["learned"]
    assert start == {"log_inv_temperature": [pytest.approx(2.302585, rel=1e-6)], "bias": [-10.0]}
    for name in start:
        assert abs(end[name][0] - start[name][0]) > 1e-3, name
    assert found["restored"] == found["saved"]
    assert found["saved"]["learned"] != end
    assert found["resumed_end"] == found["end"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", ["minc", pytest.param("byol", marks=pytest.mark.slow)])
def test_targets_and_moments_are_resumed_bit_for_bit_under_zero_1(name: str, tiny_config: Path, tmp_path: Path) -> None:
    settings = ["train.zero_stage=1", "loss.target_momentum=0.9"]
    settings += ["loss.predictor_hidden=8"] if name == "byol" else []
    found = run(RESUME, tiny_config, tmp_path, NUM_STEPS, SAVED_AT, name, *settings)
    for key in ("target", "weight", "probe", "moments", "learned" if name == "byol" else "remembered"):
        assert found["saved"][key] != found["end"][key], key  # each of them moves
    assert found["start"]["target"] != found["saved"]["target"]
    assert found["restored"] == found["saved"]
    assert found["resumed_end"] == found["end"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


TARGETS = ("minc", "byol", "linear_byol", "tico")
MULTI_CROP = ["simclr-crops", "minc-crops", "vicreg-crops"]  # views of two sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "precision", "names"),
    [*((stage, "fp32", [*LOSSES, *MULTI_CROP]) for stage in (0, 1, 2)), (1, "bf16", [*TARGETS, "mio"])],
    ids=["zero0", "zero1", "zero2", "zero1-bf16"],
)
def test_every_objective_trains_under_deepspeed(
    zero_stage: int, precision: str, names: list[str], tiny_config: Path, tmp_path: Path
) -> None:
    """With the target network, whose weights stay fp32, and the online probe."""
    settings = f"train.zero_stage={zero_stage} train.precision={precision}"
    found = run(OTHERS, tiny_config, tmp_path, NUM_STEPS, settings, *names)
    for name in names:
        start, end = found[name]["start"], found[name]["end"]
        assert end["step"] == NUM_STEPS
        assert end["weight"] != start["weight"]
        assert end["probe"] != start["probe"]
        assert bool(end["target"]) == (name.partition("-")[0] in TARGETS)
        if end["target"]:
            assert end["target"] != start["target"]
        assert all(math.isfinite(x) for x in end["weight"])
        values = losses(tmp_path / name)
        assert len(set(values)) == NUM_STEPS
        assert all(map(math.isfinite, values))
    firsts = [losses(tmp_path / name)[0] for name in names]
    assert len(set(firsts)) == len(firsts)  # each name is its own loss
