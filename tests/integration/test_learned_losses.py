"""Every loss trains from a config; what a loss learns is trained, saved and resumed with the rest."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

NUM_STEPS = 4
SAVED_AT = 2

# One process for several runs: a Trainer joins a process group, and most of a tiny run's seconds are imports.
BEGIN = """
import json, sys
from itertools import islice
import torch
from fastssl import report
from fastssl.config import load_config
from fastssl.trainer import Trainer

report.draw_views = lambda *_: None  # a second each
config, folder = sys.argv[1:3]

def start(name, run, *settings):
    return Trainer(load_config(config, [f"loss={{name: {name}}}", f"run.dir={folder}/{run}", *settings]))

def take_steps(trainer, num_steps):
    batches = trainer.loader.epoch(0, first_batch=trainer.step)
    trainer.timer.start()
    trainer.fit_batches(islice(batches, num_steps))
    batches.close()
    return state(trainer)

def state(trainer):
    learned = {name: x.double().flatten().tolist() for name, x in trainer.loss.named_parameters()}
    weight = next(trainer.model.parameters()).double().flatten().tolist()
    moments = [x["momentum_buffer"].double().sum().item() for x in trainer.optimizer.state_dict()["state"].values()]
    return {"learned": learned, "weight": weight, "moments": moments, "step": trainer.step}
"""

RESUME = """
whole = start("siglip", "whole")
found = {"start": state(whole), "end": take_steps(whole, int(sys.argv[3]))}
cut = start("siglip", "cut")
found["saved"] = take_steps(cut, int(sys.argv[4]))
cut.save()
again = start("siglip", "cut", "run.resume=auto")
found["restored"] = state(again)
found["resumed_end"] = take_steps(again, int(sys.argv[3]) - again.step)
print(json.dumps(found))
"""

OTHERS = """
found = {}
crops = "views.specs=[{size_px: 16}, {size_px: 16}, {size_px: 8, crop_scale: [.05, .2]}]"
for name in sys.argv[4:]:
    trainer = start("simclr", name, crops) if name == "three_views" else start(name, name)
    found[name] = {"start": state(trainer), "end": take_steps(trainer, int(sys.argv[3]))}
print(json.dumps(found))
"""


def run(program: str, config: Path, folder: Path, *arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(config), str(folder), *map(str, arguments)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_siglip_learns_is_trained_and_resumed_bit_for_bit(tiny_config: Path, tmp_path: Path) -> None:
    found = run(RESUME, tiny_config, tmp_path, NUM_STEPS, SAVED_AT)
    start, end = found["start"]["learned"], found["end"]["learned"]
    assert start == {"log_inv_temperature": [pytest.approx(2.302585, rel=1e-6)], "bias": [-10.0]}
    for name in start:
        assert abs(end[name][0] - start[name][0]) > 1e-3, name
    assert found["restored"] == found["saved"]
    assert found["saved"]["learned"] != end
    assert found["resumed_end"] == found["end"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_other_losses_and_three_views_train(tiny_config: Path, tmp_path: Path) -> None:
    """The last is NT-Xent on views of two sizes."""
    found = run(OTHERS, tiny_config, tmp_path, NUM_STEPS, "dcl", "dclw", "spectral", "three_views")
    for name in ("dcl", "dclw", "spectral", "three_views"):
        assert found[name]["start"]["learned"] == {}
        assert found[name]["end"]["step"] == NUM_STEPS
        assert found[name]["end"]["weight"] != found[name]["start"]["weight"]
        values = losses(tmp_path / name)
        assert len(set(values)) == NUM_STEPS
        assert all(map(math.isfinite, values))
    assert losses(tmp_path / "dcl")[0] != losses(tmp_path / "dclw")[0]  # each name is its own loss
