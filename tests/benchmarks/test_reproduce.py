"""A row from images to accuracies, killed on its way; where the images may lie; bad input."""

import csv
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import reproduce
from fastssl.optim.schedules import learning_rate
from fastssl.tracking.writers import read_rows
from tests.helpers.processes import ROOT, environment

NUM_TRAIN, NUM_TEST, NUM_CLASSES = 400, 320, 4
NUM_EPOCHS, STEPS = 6, NUM_TRAIN // 128
# A network for seconds; one kept checkpoint is not at the end.
SMALL = [
    "views.size_px=16",
    "model.backbone=timm/resnet18",
    "model.backbone_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "run.num_threads=1",
    "run.log_every_steps=1",
    "run.checkpoint_every_epochs=1",
    "eval.linear_epochs=3",
]
OPTIONS = ["--row", "cifar10-mio-exp", "--epochs", str(NUM_EPOCHS), "--keep-every", "2", "--device", "cpu"]


def _images(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around a colour and a direction of stripes for each class, uint8 [num, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    y = np.arange(num) % NUM_CLASSES
    stripes = np.sin(np.arange(32) / 2)
    x = rng.normal(128, 40, (num, 32, 32, 3))
    x += 40 * np.where((y % 2 == 0)[:, None, None, None], stripes[:, None, None], stripes[None, :, None])
    x[..., 0] += 60 * (y // 2)[:, None, None]
    return x.clip(0, 255).astype(np.uint8), y.astype(np.int64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    for split, num, seed in (("train", NUM_TRAIN, 0), ("test", NUM_TEST, 1)):
        x, y = _images(num, seed)
        np.savez(folder / f"cifar10_{split}.npz", x=x, y=y)
    return folder


@pytest.mark.slow
def test_a_killed_row_goes_on_and_ends_as_one_that_was_not(data, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = killed / f"cifar10-mio-exp_{NUM_EPOCHS}ep_seed0"
    first = subprocess.Popen(_command(data, killed), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    _wait_until(lambda: (run / "checkpoints" / f"step_{3 * STEPS:08d}").exists())
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    with (run / "lock").open("a") as lock:  # the training ends with its parent and lets go of the folder
        _wait_until(lambda: _is_free(lock), timeout_s=20)

    second = _run(data, killed)
    assert "resumed at step" in second.stdout
    rows = _read(killed / "results.csv")
    epochs = [row for row in read_rows(run / "metrics.jsonl") if row.get("kind") == "epoch"]
    assert [row["epoch"] for row in epochs] == list(range(NUM_EPOCHS))
    rates = [row["learning_rate"] for row in read_rows(run / "metrics.jsonl") if "learning_rate" in row]
    assert rates == [
        learning_rate(e, base_lr=0.4, global_batch_size=128, warmup_steps=0, total_steps=NUM_EPOCHS)
        for e in range(NUM_EPOCHS)
        for _ in range(STEPS)
    ]

    held_out = {int(row["checkpoint_step"]): row for row in rows if row["checkpoint"] == "kept"}
    assert list(held_out) == [2 * STEPS, 4 * STEPS, 6 * STEPS]
    assert {(row["scored_on"], row["num_scored"]) for row in held_out.values()} == {("held-out training images", "40")}
    best = max(held_out, key=lambda step: (float(held_out[step]["percent"]), step))
    on_test = [row for row in rows if row["checkpoint"] != "kept"]
    assert [(row["checkpoint"], int(row["checkpoint_step"]), row["metric"]) for row in on_test] == [
        *(("last", 6 * STEPS, metric) for metric in ("knn_k200_top1", "linear_top1")),
        *(("best", best, metric) for metric in ("knn_k200_top1", "linear_top1")),
    ]
    assert {(row["scored_on"], row["num_scored"]) for row in on_test} == {("test images", str(NUM_TEST))}
    assert all(float(row["percent"]) > 100 / NUM_CLASSES for row in on_test)
    assert all(float(row["train_seconds"]) > 0 and int(row["peak_memory_bytes"]) > 0 for row in rows)
    curve = _read(run / "curve.csv")
    assert [row["held_out_knn_top1"] != "" for row in curve] == [False, True] * 3

    before = (killed / "results.csv").read_bytes(), (run / "eval.jsonl").read_bytes()
    third = _run(data, killed)
    assert "epoch" not in third.stdout.split("row ")[0], "nothing is trained again"
    assert before == ((killed / "results.csv").read_bytes(), (run / "eval.jsonl").read_bytes())
    assert third.stdout.splitlines()[-len(rows) - 2 :] == second.stdout.splitlines()[-len(rows) - 2 :]

    other = [*_command(data, killed), "loss.temperature_positive=0.3"]
    refused = subprocess.run(other, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert refused.returncode == 2
    assert "differs in loss.temperature_positive" in refused.stderr

    _run(data, whole)
    accuracies = ("metric", "percent", "scored_on", "checkpoint", "checkpoint_step", "chosen")
    assert [[row[name] for name in accuracies] for row in _read(whole / "results.csv")] == [
        [row[name] for name in accuracies] for row in rows
    ]


def test_images_are_found_in_every_form_and_are_the_same(data, tmp_path):
    x, y = reproduce.load_cifar10(data, "train")
    expected = _images(NUM_TRAIN, 0)
    assert np.array_equal(x, expected[0])
    assert np.array_equal(y, expected[1])
    strips = tmp_path / "strips"
    strips.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(NUM_TRAIN), 4)):
        Image.fromarray(x[rows].reshape(-1, 32, 3)).save(strips / f"train_{number:03d}.webp", lossless=True)
    np.savez(strips / "labels.npz", y_train=y, y_test=y[:10])
    reproduce.prepare(strips, "train", tmp_path / "beton" / "cifar10_train.beton", 0)
    for folder in (strips, tmp_path / "beton"):
        for limit in (0, 150):
            found = reproduce.load_cifar10(folder, "train", limit)
            assert np.array_equal(found[0], x[: limit or None])
            assert np.array_equal(found[1], y[: limit or None])
            assert found[1].dtype == np.int64
    assert sorted(path.name for path in (tmp_path / "beton").iterdir()) == [
        "cifar10_train.beton",
        "cifar10_train.beton.json",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "cifar10-mio"], "--row must be one of cifar10-mio-exp, "),
        (["--epochs", "0"], "--epochs and --keep-every must be >= 1"),
        (["--epochs", "x"], "argument --epochs: invalid int value"),
        (["--seed", "-1"], "--seed must be >= 0"),
        (["--limit", "20"], "--limit must be at least 300"),
        (["--data", "/nowhere"], "--data /nowhere is no folder"),
        (["--set", "run.seed=3"], "--set run.seed: --seed sets it"),
        (["--set", "loss.temprature=3"], "unknown key loss.temprature: did you mean temperature"),
        (["--set", "data.global_batch_size=512", "--limit", "400"], "--limit must be at least 512, a batch"),
        ([], "holds no CIFAR-10 train images: cifar10_train.beton, cifar10_train.npz"),
    ],
)
def test_bad_input_costs_one_line(arguments, message, tmp_path, capsys):
    options = [*OPTIONS, "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert reproduce.main([*options, *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("reproduce: error: ")
    assert message in line


def test_rows_name_configurations_that_differ_in_loss_and_batch_only():
    jobs = {
        name: reproduce.load_config([ROOT / "configs" / part for part in parts], changes)
        for name, (parts, changes) in reproduce.ROWS.items()
    }
    for name, cfg in jobs.items():
        assert cfg.data.global_batch_size == (512 if name.endswith("-b512") else 128)
        assert cfg.loss.name == name.split("-")[1]
        assert getattr(cfg.loss, "negative", "none") == {"exp": "exp", "jensen": "jensen"}.get(
            name.split("-")[-1 - name.endswith("-b512")], "none"
        )
        assert (cfg.optim, cfg.views, cfg.model) == tuple(
            getattr(jobs["cifar10-mio-exp"], part) for part in ("optim", "views", "model")
        )


def _command(data: Path, out: Path) -> list[str]:
    options = [*OPTIONS, "--data", str(data), "--out", str(out), "--set", *SMALL]
    return [sys.executable, str(ROOT / "benchmarks/reproduce.py"), *options]


def _run(data: Path, out: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(_command(data, out), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _is_free(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(lock, fcntl.LOCK_UN)
    return True


def _wait_until(is_true, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)
