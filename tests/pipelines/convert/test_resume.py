"""A killed conversion goes on where it was, and its file is the one that an unbroken conversion writes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.beton import BetonReader, BetonWriter
from pipelines.convert import convert, convert_shards
from pipelines.errors import DataError
from tests.helpers.image_folders import write_image_folder
from tests.helpers.processes import ROOT

# Checkpoints every 50 ms, and images slow enough to be killed between two.
CHILD = """
import sys, time
import pipelines.convert as c
c.CHECKPOINT_EVERY_S = 0.05
write = c._write
def slow(*arguments):
    time.sleep(0.002)
    write(*arguments)
c._write = slow
c.convert("folder", sys.argv[1], sys.argv[2], on_error="skip", resume=sys.argv[3] == "resume")
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("resume") / "images", 600)


def start(images: Path, out: Path, how: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(images), str(out), how]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def kill_after_a_checkpoint(process: subprocess.Popen, out: Path, wait_s: float) -> None:
    checkpoint = out.with_name(f"{out.name}.partial.npz")
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    deadline = time.monotonic() + 60
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_conversion_that_is_killed_twice_gives_the_same_bytes(images, tmp_path):
    whole = convert("folder", str(images), tmp_path / "whole.beton", on_error="skip")
    out = tmp_path / "x.beton"
    for how in ("new", "resume"):
        kill_after_a_checkpoint(start(images, out, how), out, random.uniform(0, 0.2))
        assert not out.exists()
    report = convert("folder", str(images), out, on_error="skip", resume=True)
    assert out.read_bytes() == whole.out.read_bytes()
    sidecar, expected = (json.loads(Path(f"{path}.json").read_text()) for path in (out, whole.out))
    assert sidecar == expected
    assert report.errors_path is not None
    assert whole.errors_path is not None
    assert report.errors_path.read_text() == whole.errors_path.read_text()
    assert report.num_images + report.num_skipped == 600
    assert (report.num_images, report.num_skipped) == (whole.num_images, 12)
    assert sorted(path.name for path in tmp_path.glob("x.beton*")) == [
        *("x.beton", "x.beton.errors.txt", "x.beton.hashes", "x.beton.json", "x.beton.rows")
    ]
    assert out.with_name("x.beton.rows").read_bytes() == whole.out.with_name("whole.beton.rows").read_bytes()


def test_what_was_begun_is_neither_lost_nor_mixed_with_another_source(images, tmp_path, capsys):
    out = tmp_path / "x.beton"
    kill_after_a_checkpoint(start(images, out, "new"), out, 0)
    with pytest.raises(DataError, match=r"x\.beton\.partial: left by a conversion.*--resume or --overwrite"):
        convert("folder", str(images), out, on_error="skip")
    with pytest.raises(DataError, match="of another source or other options"):
        convert("folder", str(images), out, on_error="skip", resume=True, max_px=10)
    other = tmp_path / "images"
    shutil.copytree(images, other)
    with pytest.raises(DataError, match="of another source or other options"):
        convert("folder", str(other), out, on_error="skip", resume=True)
    assert out.with_name("x.beton.partial").exists()
    with pytest.raises(DataError, match=r"\.(png|jpg): empty file"):  # goes on, and now forgives nothing
        convert("folder", str(images), out, on_error="fail", resume=True)
    first = convert("folder", str(images), out, on_error="skip", resume=True)
    capsys.readouterr()
    again = convert("folder", str(images), out, on_error="skip", resume=True)
    assert capsys.readouterr().out == f"{out}: finished already\n"
    names = ("out", "num_images", "num_raw", "num_ignored", "left_out", "num_copies", "num_similar", "errors_path")
    assert [getattr(again, name) for name in names] == [getattr(first, name) for name in names]
    assert again.num_images == BetonReader(out).num_samples > again.num_raw
    assert (again.num_passed, again.num_encoded) == (0, 0)  # unknown
    with pytest.raises(DataError, match="exists already, of another source or other options; convert again under"):
        convert("folder", str(images), out, on_error="skip", resume=True, quality=90)


def test_resumed_shards_leave_finished_ones_alone(images, tmp_path):
    options = {"num_shards": 3, "on_error": "skip"}
    convert_shards("folder", str(images), tmp_path / "x.beton", shard=1, **options)
    finished = tmp_path / "x-00001-of-00003.beton"
    date = finished.stat().st_mtime_ns
    convert_shards("folder", str(images), tmp_path / "x.beton", resume=True, **options)
    assert finished.stat().st_mtime_ns == date
    whole = BetonReader(convert("folder", str(images), tmp_path / "whole.beton", on_error="skip").out)
    parts = [BetonReader(tmp_path / f"x-{k:05d}-of-00003.beton") for k in range(3)]
    found = [part.image_bytes(i).tobytes() for part in parts for i in range(part.num_samples)]
    assert found == [whole.image_bytes(i).tobytes() for i in range(whole.num_samples)]
    assert all(part.class_names == ["a", "b"] for part in parts)


def test_bad_shards(images, tmp_path):
    for options, reason in (
        ({"num_shards": 0}, "shards must be 1"),
        ({"num_shards": 2, "shard": 2}, r"shard must be 0\.\.1, not 2"),
        ({"num_shards": 601}, "600 images are too few for 601 shards"),
        ({"num_shards": 2, "num_workers": -1}, "workers must be"),
    ):
        with pytest.raises(ValueError, match=reason):
            convert_shards("folder", str(images), tmp_path / "x.beton", **options)


def test_two_conversions_of_one_name_do_not_mix(tmp_path):
    with BetonWriter(tmp_path / "x.beton") as writer:
        writer.write_raw(np.zeros((4, 4, 3), np.uint8))
        with pytest.raises(DataError, match="another process is writing it"), BetonWriter(tmp_path / "x.beton"):
            pass
    assert BetonReader(tmp_path / "x.beton").num_samples == 1


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "x.beton"

    def interrupted() -> None:
        with BetonWriter(path, 10) as writer:
            writer.write_raw(np.zeros((4, 4, 3), np.uint8))
            writer.checkpoint({"k": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    checkpoint = tmp_path / "x.beton.partial.npz"
    content = checkpoint.read_bytes()
    with BetonWriter(tmp_path / "y.beton", 10) as writer:
        writer.write_raw(np.zeros((4, 4, 3), np.uint8))
    for bad in (b"", content[:200], bytes(len(content))):
        checkpoint.write_bytes(bad)
        with pytest.raises(DataError, match="does not fit"), BetonWriter(path, 10, resume=True):
            pass
    checkpoint.write_bytes(content)
    with pytest.raises(DataError, match="does not fit"), BetonWriter(path, 1_000_000, resume=True):
        pass
    with BetonWriter(path, 10, resume=True) as writer:
        assert writer.note == {"k": 1}
    assert path.read_bytes() == (tmp_path / "y.beton").read_bytes()


def test_processes_give_the_same_file_as_threads(images, tmp_path):
    for num_workers in (0, 2):
        convert("folder", str(images), tmp_path / f"{num_workers}.beton", on_error="skip", num_workers=num_workers)
    assert (tmp_path / "0.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()


def test_a_dead_worker_process_costs_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.convert._StoreItems", _Dying)
    with pytest.raises(DataError, match="a worker process died"):
        convert("folder", str(images), tmp_path / "x.beton", num_workers=2)
    assert not list(tmp_path.glob("x.beton*"))


class _Dying:
    def __init__(self, *options) -> None:
        pass

    def __call__(self, items: list) -> list:
        os.kill(os.getpid(), signal.SIGKILL)
        return items


def test_a_finished_file_is_told_by_what_is_known_of_it(tmp_path, in_process):
    folder = write_image_folder(tmp_path / "photos", 6)
    first, again = (in_process("convert", folder, tmp_path / "x.beton", "--resume").stdout for _ in range(2))
    assert "6 images in" in first
    assert again.splitlines()[-1] == f"{tmp_path}/x.beton: 6 images"
