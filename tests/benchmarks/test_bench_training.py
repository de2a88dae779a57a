"""The benchmark of whole trainings: a row for every contestant, also for one that is not installed."""

import csv
import importlib.util
import sys

import pytest

TINY = [
    "model.backbone=timm/resnet18",
    "model.backbone_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "model.projector_hidden=[16]",
    "views.size_px=16",
    "data.global_batch_size=8",
    "train.precision=fp32",
    "run.num_threads=1",
]


@pytest.mark.slow
def test_a_row_for_every_contestant(digits, command, tmp_path):
    out = tmp_path / "training.csv"
    contestants = ["fastssl, not compiled", "Lightly, tuned"]
    arguments = [
        "--cifar10",
        digits / "train.beton",
        "--contestants",
        *contestants,
        "--seconds",
        "0.2",
        "--rounds",
        "2",
    ]
    done = command(sys.executable, "benchmarks/bench_training.py", *arguments, "--out", out, "--set", *TINY)
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        ours, lightly = csv.DictReader(file)
    assert ours["contestant"] in done.stdout
    assert float(ours["img_per_s"]) > 0
    assert float(ours["held_img_per_s"]) > 0
    assert not ours["note"]
    if importlib.util.find_spec("lightly"):
        assert float(ours["ratio_to_lightly"]) > 0
    else:
        assert "lightly" in lightly["note"]
        assert not lightly["img_per_s"]


def test_bad_input_is_one_line(command):
    done = command(sys.executable, "benchmarks/bench_training.py", "--cifar10", "absent.beton")
    assert done.returncode == 2
    assert "absent.beton: no such file" in done.stderr.splitlines()[-1]
