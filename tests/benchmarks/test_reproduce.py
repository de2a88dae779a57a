"""A row from images to accuracies, killed on its way; where the images may lie; bad input."""

import csv
import fcntl
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import reproduce
from fastssl.evaluation.labels import check_same_classes
from fastssl.optim.schedules import learning_rate
from fastssl.tracking.writers import read_rows
from pipelines.beton import BetonReader
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
    assert "different configuration: loss.temperature_positive" in refused.stderr

    _run(data, whole)
    accuracies = ("metric", "percent", "scored_on", "checkpoint", "checkpoint_step", "chosen")
    assert [[row[name] for name in accuracies] for row in _read(whole / "results.csv")] == [
        [row[name] for name in accuracies] for row in rows
    ]


def test_images_are_found_in_every_form_and_are_the_same(data, tmp_path):
    x, y = reproduce.load_cifar(data, "train")
    expected = _images(NUM_TRAIN, 0)
    assert np.array_equal(x, expected[0])
    assert np.array_equal(y, expected[1])
    strips = tmp_path / "strips"
    strips.mkdir()
    for number, rows in enumerate(np.array_split(np.arange(NUM_TRAIN), 4)):
        Image.fromarray(x[rows].reshape(-1, 32, 3)).save(strips / f"train_{number:03d}.webp", lossless=True)
    np.savez(strips / "labels.npz", y_train=y, y_test=y[:10])
    reproduce.prepare(_job("cifar10-mio-exp", strips, tmp_path / "out"), "train")
    for folder in (strips, tmp_path / "out" / "data"):
        for limit in (0, 150):
            found = reproduce.load_cifar(folder, "train", limit)
            assert np.array_equal(found[0], x[: limit or None])
            assert np.array_equal(found[1], y[: limit or None])
            assert found[1].dtype == np.int64
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == [
        "cifar10_train.beton",
        "cifar10_train.beton.hashes",
        "cifar10_train.beton.json",
        "cifar10_train.beton.rows",
    ]


def test_cifar100_is_read_from_torchvisions_folder_and_from_arrays(tmp_path, monkeypatch):
    from torchvision import datasets  # MD5 sums are those of the real files

    x, y = _images(320, 0)
    folder = tmp_path / "python" / datasets.CIFAR100.base_folder
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        batch = {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), "fine_labels": y.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c", "d"]}))
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [("train", None)])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [("test", None)])
    monkeypatch.setitem(datasets.CIFAR100.meta, "md5", None)
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "cifar100_train.npz", x=x, y=y)
    for layout, limit in (("python", 0), ("arrays", 0), ("arrays", 300)):
        out = tmp_path / f"{layout}{limit}"
        reader = _prepared("cifar100-mio-exp", tmp_path / layout, out, "train", "--limit", str(limit))
        num = limit or len(x)
        assert reader.labels.tolist() == y[:num].tolist()
        assert np.array_equal(np.stack([reader.decode(i) for i in range(num)]), x[:num])


def test_stl10_has_its_unlabelled_images_for_pretraining_only(tmp_path, monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)  # MD5 sums of the real files
    folder = tmp_path / datasets.STL10.base_folder
    folder.mkdir()
    for name, levels in (("train", [10, 60]), ("unlabeled", [110, 160, 210]), ("test", [40])):
        np.repeat(np.array(levels, np.uint8), 3 * 96 * 96).tofile(folder / f"{name}_X.bin")
    np.array([2, 1], np.uint8).tofile(folder / "train_y.bin")
    np.array([2], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird")
    train = _prepared("stl10-simclr", tmp_path, tmp_path / "out", "train")
    assert train.labels.tolist() == [1, 0, -1, -1, -1]  # evaluation leaves out the images without a label
    assert [round(float(train.decode(i).mean()), -1) for i in range(5)] == [10, 60, 110, 160, 210]
    test = _prepared("stl10-simclr", tmp_path, tmp_path / "out", "test")
    assert test.labels.tolist() == [1]
    check_same_classes(train, test, "data.test")


def test_tiny_imagenets_validation_images_get_the_classes_of_their_table(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for name, level in (("n02", 50), ("n01", 100)):
        _save(folder / "train" / name / "images" / f"{name}_0.JPEG", level)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t63\t63\n")
    lines = [("val_0.JPEG", "n02", 150), ("val_1.JPEG", "n01", 200), ("val_10.JPEG", "n02", 250)]
    for name, _, level in lines:
        _save(folder / "val" / "images" / name, level)
    table = "".join(f"{name}\t{label}\t0\t0\t63\t63\n" for name, label, _ in lines)
    (folder / "val" / "val_annotations.txt").write_text(table)
    for data in (tmp_path, folder):
        out = tmp_path / f"out_{data.name}"
        train = _prepared("tiny_imagenet-mio-exp", data, out, "train")
        assert [(_level(train, i), int(train.labels[i])) for i in range(2)] == [(100, 0), (50, 1)]
        test = _prepared("tiny_imagenet-mio-exp", data, out, "test")
        assert [(_level(test, i), int(test.labels[i])) for i in range(3)] == [(150, 1), (200, 0), (250, 1)]
        assert train.class_names == test.class_names == ["n01", "n02"]
        assert not list(out.glob("data/*.csv"))


def test_imagenet100_is_the_classes_of_a_list(tmp_path, capsys):
    names = [f"n{number:03d}" for number in range(101)]
    for split in ("train", "val"):
        for number, name in enumerate(names):
            _save(tmp_path / split / name / "x.JPEG", number, size_px=16)
    classes = tmp_path / "classes.txt"
    classes.write_text("n070\nn020\n")
    options = ["--classes", str(classes)]
    for split in ("train", "test"):
        reader = _prepared("imagenet100-mio-exp", tmp_path, tmp_path / "out", split, *options)
        assert [(_level(reader, i), int(reader.labels[i])) for i in range(2)] == [(20, 0), (70, 1)]
        assert reader.class_names == ["n020", "n070"]
    assert _prepared("imagenet-simclr", tmp_path, tmp_path / "whole", "test").num_samples == 101
    for arguments, message in (
        ([], "train has 101 classes: name the 100 with --classes FILE"),
        ([*options, "--limit", "300"], "--limit is for the rows of cifar10 and cifar100"),
        ([*options, "--row", "imagenet-mio-exp"], "--classes is for the rows of imagenet100"),
    ):
        row = ["--row", "imagenet100-mio-exp", "--data", str(tmp_path), "--out", str(tmp_path / "new"), *arguments]
        _costs_one_line(row, message, capsys)
    classes.write_text("n070\n")
    row = ["--row", "imagenet100-mio-exp", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *options]
    _costs_one_line(row, f"imagenet100_train.beton holds other classes than {classes}", capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "cifar100-mio-exp",
            "holds no CIFAR-100 train images: cifar100_train.beton, cifar100_train.npz (x, y), or torch",
        ),
        ("stl10-mio-exp", "holds no STL-10: torchvision's folder stl10_binary"),
        ("tiny_imagenet-mio-exp", "holds no Tiny-ImageNet: tiny-imagenet-200 with train/ and val/"),
        ("imagenet100-mio-exp", "holds no ImageNet: train/ with a sub-folder for each class"),
        ("imagenet-mio-exp", "holds no ImageNet: train/ with a sub-folder for each class"),
    ],
)
def test_missing_images_cost_one_line(row, message, tmp_path, capsys):
    _costs_one_line(["--row", row, "--data", str(tmp_path), "--out", str(tmp_path / "out")], message, capsys)


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
    _costs_one_line([*OPTIONS, "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments], message, capsys)


def _costs_one_line(arguments, message, capsys):
    capsys.readouterr()
    assert reproduce.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("reproduce: error: ")
    assert message in line


def test_rows_name_configurations_that_differ_in_loss_and_batch_only():
    """MINC and the spectral loss have heads of their own, and the latter a recipe of its own for ImageNet."""
    jobs = {
        name: reproduce.load_config([ROOT / "configs" / part for part in parts], [*changes, "run.dir=unused"])
        for name, (parts, changes) in reproduce.ROWS.items()
    }
    sizes = {"imagenet100": 512, "imagenet": 2048}
    for name, cfg in jobs.items():
        images, loss, *more = name.split("-")
        assert cfg.loss.name == loss
        assert getattr(cfg.loss, "negative", "none") == (more[0] if loss == "mio" else "none")
        assert Path(cfg.data.train).name == f"{images}_train.beton"
        if not (loss == "spectral" and "imagenet" in images.split("_")[0]):
            assert cfg.data.global_batch_size == (512 if "b512" in more else sizes.get(images, 128))
        reference = jobs[f"{images}-mio-exp"]
        assert cfg.views == reference.views
        assert (cfg.model.backbone, cfg.model.stem) == (reference.model.backbone, reference.model.stem)
        if loss in ("mio", "simclr"):
            assert (cfg.optim, cfg.model) == (reference.optim, reference.model)
        assert cfg.train.num_epochs == (100 if images == "imagenet" else 200)
    assert len(jobs) == 6 * 5 + 5


def _job(row: str, data: Path, out: Path, *more: str) -> reproduce.Job:
    options = ["--row", row, "--data", str(data), "--out", str(out), "--device", "cpu", *more]
    return reproduce.build_job(reproduce.parse(options))


def _prepared(row: str, data: Path, out: Path, split: reproduce.Split, *more: str) -> BetonReader:
    """Convert a split for a row, and open the file that its training or evaluation will read."""
    job = _job(row, data, out, *more)
    reproduce.prepare(job, split)
    return BetonReader(job.cfg.data.train if split == "train" else str(job.cfg.data.test))


def _save(path: Path, level: int, size_px: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size_px, size_px), (level, level, level)).save(path)


def _level(reader: BetonReader, index: int) -> int:
    return int(reader.decode(index)[8, 8, 0])


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
