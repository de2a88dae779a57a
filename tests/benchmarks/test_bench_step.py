"""The benchmark of whole steps: the bare loop takes the trainer's steps, and the rows say what was compared."""

import csv
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment

COUNTS = ["--num-rounds", "2", "--num-warmup", "1", "--num-steps", "2"]

# In a process of its own: a Trainer joins a process group and sets the launcher's variables.
SAME_STEPS = """
import sys
from itertools import islice
import torch
from benchmarks.bench_step import OVERRIDES, Bench, forever
from fastssl.config import load_config

bench = Bench(load_config(sys.argv[1], [*OVERRIDES, "optim.warmup_epochs=0"]))
start = {name: tensor.clone() for name, tensor in bench.bare.objective.model.state_dict().items()}
bench.bare.fit_batches(islice(forever(bench.held), 5))
bench.fit_trainer(islice(forever(bench.held), 5), probe=False)
bare, trained = bench.bare.objective.model.state_dict(), bench.trainer.model.state_dict()
bench.close()
print("moved:", sum(not torch.equal(start[name], bare[name]) for name in bare), "of", len(bare))
print("different:", [name for name in bare if not torch.equal(bare[name], trained[name])])
"""


@pytest.mark.slow
def test_bare_loop_and_trainer_take_the_same_steps_bit_for_bit(tiny_config):
    done = subprocess.run(
        [sys.executable, "-c", SAME_STEPS, str(tiny_config)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, moved, different = done.stdout.splitlines()
    assert different == "different: []"
    _, num_moved, _, num_tensors = moved.split()
    assert int(num_moved) == int(num_tensors)


@pytest.mark.slow
def test_rows_and_table(tiny_config, command, tmp_path):
    out = tmp_path / "step.csv"
    arguments = ["--cfg", tiny_config, "--set", "data.num_workers=1", *COUNTS, "--out"]
    done = command(sys.executable, "benchmarks/bench_step.py", *arguments, out)
    assert done.returncode == 0, done.stderr
    for text in ("sharing them alone loses", "backward", "whole step"):
        assert text in done.stdout
    with out.open() as file:
        rows = {(row["loop"], row["probe"], row["batches"]): row for row in csv.DictReader(file)}
    assert set(rows) == {
        ("bare", "no", "held"),
        ("trainer", "no", "held"),
        ("trainer", "yes", "held"),
        ("trainer", "yes", "synthetic"),
        ("bare", "no", "ffcv"),
        ("trainer", "yes", "ffcv"),
        ("none", "no", "synthetic"),
        ("none", "no", "ffcv"),
    }
    assert all(float(row["img_per_s_p50"]) > 0 and row["torch"] and row["cpu"] for row in rows.values())
    has_ratio = {name: [key for key, row in rows.items() if row[name]] for name in next(iter(rows.values()))}
    assert set(has_ratio["ratio_to_synthetic_p50"]) == {("trainer", "yes", "ffcv")}
    assert ("bare", "no", "held") not in has_ratio["ratio_to_bare_p50"]
    assert ("trainer", "no", "held") in has_ratio["ratio_to_bare_p50"]
