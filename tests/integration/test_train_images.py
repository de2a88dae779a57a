"""`fastssl train FOLDER`: from a folder of images to an encoder, without a configuration."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from fastssl.checkpoint.save_load import last_checkpoint, load_weights
from tests.helpers.processes import ROOT, environment
from tests.integration.test_bad_input import assert_one_line

# So that a step takes a moment: a network with few channels.
SMALL = (
    "model.backbone=timm/resnet18",
    "model.backbone_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "run.num_threads=1",
    "train.num_epochs=2",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 24 images of 24 px: dark and bright ones."""
    folder = tmp_path_factory.mktemp("given") / "bücher"
    rng = np.random.default_rng(0)
    for i in range(48):
        path = folder / ("dunkel", "hell")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128, (24, 24, 3), np.uint8) + np.uint8(100 * (i % 2))).save(path)
    return folder


@pytest.fixture
def trained(photos, tmp_path, in_process):
    """Trains on the photos, in tmp_path/"run"."""

    def run(*options, source=photos, settings=SMALL):
        return in_process("train", source, "--run", tmp_path / "run", *options, "--set", *settings)

    return run


@pytest.mark.slow
def test_one_command_leads_to_an_encoder_and_says_what_it_does(trained, tmp_path, photos):
    done = trained()
    assert done.returncode == 0, done.stderr
    out, run = done.stdout, tmp_path / "run"
    shown = (
        "48 images",
        "2 classes",
        "too few",
        "views.size_px",
        "measured:",
        "time: about",
        "accuracy on",
        "encoder:",
    )
    assert [each for each in shown if each not in out] == []
    positions = [out.index(each) for each in ("measuring some steps", "time: about", "mio on 48 images", "accuracy on")]
    assert positions == sorted(positions)
    settings = yaml.safe_load((run / "start.yaml").read_text())
    assert settings["views"]["size_px"] == 32
    assert settings["train"]["num_epochs"] == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["views"]["size_px"] == 32
    assert load_weights(run / "encoder.pt")["backbone"].keys() == load_weights(run)["backbone"].keys()
    assert f"fastssl embed {photos}" in out.splitlines()[-2]
    assert not list(run.glob(".*"))  # nothing half-written

    again = trained()
    assert again.returncode == 0, again.stderr
    assert "has started already" in again.stdout
    assert "evaluated already" in again.stdout

    other = tmp_path / "other"
    shutil.copytree(photos, other)
    assert_one_line(trained(source=other), "other images", "--run")


@pytest.mark.slow
def test_a_dry_run_writes_settings_that_a_training_takes(trained, tmp_path, in_process):
    done = trained("--dry-run")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert done.stdout.splitlines()[-1] == f"next: fastssl train --cfg {run}/start.yaml"
    assert not (run / "config.yaml").exists()
    assert in_process("train", "--cfg", run / "start.yaml").returncode == 0
    assert trained().returncode == 0  # what the other command has trained is evaluated and exported
    assert (run / "encoder.pt").exists()


@pytest.mark.slow
def test_too_few_hours_say_how_many_are_needed_and_lose_no_conversion(trained, tmp_path):
    done = trained("--hours", "1e-6", settings=SMALL[:3])
    assert_one_line(done, "--hours", "too short for one epoch")
    beton = tmp_path / "run" / "data" / "train.beton"
    before = beton.stat().st_mtime_ns
    assert trained("--dry-run").returncode == 0
    assert beton.stat().st_mtime_ns == before


@pytest.mark.slow
def test_images_that_are_added_before_the_training_are_taken(trained, tmp_path, photos):
    mine = tmp_path / "mine"
    shutil.copytree(photos, mine)
    assert "48 images" in trained("--dry-run", source=mine).stdout
    shutil.copy(next(photos.rglob("*.png")), mine / "dunkel" / "new.png")
    done = trained("--dry-run", source=mine)
    assert done.returncode == 0, done.stderr
    assert "converting them again" in done.stdout
    assert "49 images" in done.stdout
    assert "49 images" in trained("--dry-run", source=mine).stdout  # and now as it is


@pytest.mark.slow
def test_a_test_folder_is_what_accuracy_is_measured_on(trained, tmp_path, photos):
    done = trained("--test", photos)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert {row["test"]["path"] for row in rows} == {str(tmp_path / "run" / "data" / "test.beton")}


@pytest.mark.slow
def test_images_without_labels_get_no_accuracy(trained, tmp_path, photos):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.png"):
        shutil.copy(path, flat)
    done = trained(source=flat)
    assert done.returncode == 0, done.stderr
    assert "no labels, so no accuracy" in done.stdout
    assert "accuracy on" not in done.stdout
    assert (tmp_path / "run" / "encoder.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["images to train on", "--cfg"]),
        (["{photos}", "--cfg", "x.yaml"], ["not both"]),
        (["--cfg", "x.yaml", "--hours", "2"], ["--hours", "--set"]),
        (["{photos}", "--hours", "-1"], ["--hours", "positive"]),
        (["{photos}", "--hours", "nan"], ["--hours"]),
        (["{photos}", "--processes", "0"], ["--processes"]),
        (["{photos}", "--init", "nothing.pth", "--run", "{run}"], ["--init nothing.pth", "torchvision"]),
        (["{photos}", "--set", "views.sise_px=2", "--run", "{run}"], ["views.sise_px", "size_px"]),
        (["{empty}", "--run", "{run}"], ["{empty}", "image"]),
        (["no_such_folder", "--run", "{run}"], ["no_such_folder"]),
        (["{photos}", "--test", "tset", "--run", "{run}"], ["tset"]),
        (["--cfg", "x.yaml", "--from", "folder"], ["--from is for images"]),
    ],
)
def test_bad_arguments(arguments, parts, photos, tmp_path, in_process):
    (tmp_path / "empty").mkdir()
    places = {"photos": photos, "run": tmp_path / "run", "empty": tmp_path / "empty"}
    done = in_process("train", *(each.format(**places) for each in arguments))
    assert_one_line(done, *(each.format(**places) for each in parts))
    assert not (tmp_path / "run" / "config.yaml").exists()
    if "no_such_folder" in arguments or "tset" in arguments:
        assert not (tmp_path / "run").exists()


def test_one_image_is_too_few(trained, tmp_path, photos):
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(next(photos.rglob("*.png")), lone)
    assert_one_line(trained(source=lone), "one image", "at least 2")


@pytest.mark.slow
def test_several_processes(trained, tmp_path, photos, command):
    done = command(
        "fastssl", "train", photos, "--run", tmp_path / "run", "--processes", "2", "--set", *SMALL, timeout_s=600
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert (tmp_path / "run" / "encoder.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_several_processes_with_a_checkpoint(number, tmp_path, photos):
    settings = [each for each in SMALL if "num_epochs" not in each] + ["train.num_epochs=2000"]
    arguments = ["train", photos, "--run", tmp_path / "run", "--processes", "2", "--set", *settings]
    program = [sys.executable, "-m", "fastssl.cli", *map(str, arguments)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(program, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        process.send_signal(number)
        assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert "the same command resumes" in (tmp_path / "log").read_text()
    assert last_checkpoint(tmp_path / "run" / "checkpoints") is not None


def wait_for(is_so, timeout_s=240):
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.1)
