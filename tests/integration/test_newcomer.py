"""The README's way from photographs to ten neighbours, on a folder with everything odd in it."""

import re
import shlex

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from tests.helpers.processes import ROOT

# Quick: a small network, one epoch.
SMALL = (
    "--set",
    "model.backbone=timm/resnet18",
    "model.backbone_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "run.num_threads=1",
    "train.num_epochs=1",
)


def readme_commands() -> list[list[str]]:
    """The commands of the README's section on one's own images, but the one that takes a configuration."""
    section = (ROOT / "README.md").read_text().split("## Train on your own images")[1].split("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"^    (fastssl .*)$", section, flags=re.MULTILINE)]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of 14 images each, cat.jpg, and what a real folder holds besides; the working folder is above it."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)

    def write(path, i):
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = rng.integers(0, 100, (60, 80 + i, 3), np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(levels).save(path)

    for i in range(24):
        write(folder / ("Bäume", "flowers")[i % 2] / "2024" / f"{i:02d}.jpg", i)
    for i in range(4):
        write(folder / ("Bäume", "flowers")[i % 2] / f"new {i}.{'avif' if features.check('avif') else 'png'}", i)
    write(folder / "cat.jpg", 0)
    (folder / "Bäume/broken.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:400])
    (folder / "flowers/loop").symlink_to("..")
    (folder / "flowers/again.jpg").symlink_to("2024/01.jpg")
    (folder / "notes.txt").write_text("notes")
    (folder / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


def walk(in_process, more):
    """Run the README's commands; returns what each printed, by name."""
    printed = {}
    for name, *arguments in (command[1:] for command in readme_commands()):
        done = in_process(name, *arguments, *(more if name == "train" else ()))
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
    return printed


def assert_walk(printed, folder):
    assert printed.keys() == {"train", "embed", "neighbours", "export"}
    train = printed["train"]
    for part in (
        "29 images",
        "1 of 30 images are corrupt",
        "broken.jpg",
        "2 further names",
        ".txt",
        "empty",
        "2 classes",
    ):
        assert part in train, train
    rows = pq.read_table("photos.parquet").to_pylist()
    assert len(rows) == 30
    assert [row["path"].rsplit("/", 1)[-1] for row in rows if row["error"]] == ["broken.jpg"]
    assert f"fastssl embed {folder.name}/ --model runs/photos" in train.replace(str(folder.parent) + "/", "")
    neighbours = [line for line in printed["neighbours"].splitlines() if re.match(r" +\d+ ", line)]
    assert len(neighbours) == 10
    assert Image.open("neighbours.png").width > 100
    assert "model card" in printed["export"]


def test_the_commands_of_the_readme(photos, in_process):
    assert_walk(walk(in_process, SMALL), photos)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_as_they_stand(photos, in_process):
    assert_walk(walk(in_process, ()), photos)
