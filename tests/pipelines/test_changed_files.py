"""A .beton file that is removed, replaced, overwritten or cut short while a loader reads it."""

import io
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from pipelines.errors import DataChangedError
from pipelines.loader import DataConfig, build_eval_loader, build_loader
from pipelines.views import ViewsConfig
from tests.helpers.processes import ROOT

CPU = torch.device("cpu")
VIEWS = ViewsConfig(recipe="weak", size_px=16)
NUM_IMAGES, BATCH_SIZE = 96, 4
READING_ENGINES = ("ffcv", "dali", "torch")

# Reads a file through one engine, without the loader's checks, and cuts it short after the first batch.
CUT_SHORT = """
import os, sys
import numpy as np
import torch
from pipelines.beton import BetonReader
from pipelines.beton.bus_error import report_bus_errors
from pipelines.engines import build_engine
from pipelines.views import ViewsConfig, build_view_specs, size_groups
from tests.helpers.plans import draw_of, plan_batches

path, engine = sys.argv[1:]
reader, specs = BetonReader(path), build_view_specs(ViewsConfig(recipe="weak", size_px=16))
report_bus_errors(reader)
engine = build_engine(engine, reader, num_workers=2, prefetch_batches=1, device=torch.device("cpu"))
plans = plan_batches(draw_of(specs), np.arange(reader.num_samples), reader, 4)
for number, _ in enumerate(engine.batches(plans, 4, size_groups(specs))):
    print(number, flush=True)
    os.truncate(path, int(reader.data_ptr[0]))
"""


def write(path: Path, *, seed: int = 0, as_jpegs: bool = True) -> Path:
    """96 images of 40 px of one encoded size, padded JPEGs or raw pixels; labelled by turns."""
    rng = np.random.default_rng(seed)
    with BetonWriter(path, overwrite=True) as writer:
        for i in range(NUM_IMAGES):
            image = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((40, 40))
            if as_jpegs:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=90)
                writer.write_jpeg(file.getvalue().ljust(3000, b"\0"), height_px=40, width_px=40, label=i % 3)
            else:
                writer.write_raw(np.asarray(image), label=i % 3)
    return path


def build(path: Path, engine: str):
    cfg = DataConfig(global_batch_size=BATCH_SIZE, engine=engine, prefetch_batches=1, num_workers=1)  # pyright: ignore
    return build_loader(BetonReader(path), cfg, VIEWS, seed=0, rank=0, world_size=1, device=CPU, num_threads=1)


def pixels_of(batches) -> list[torch.Tensor]:
    return [torch.stack(batch.views).clone() for batch in batches]


@pytest.mark.parametrize("engine", [*READING_ENGINES, "resident"])
@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_file_that_is_removed_or_replaced_goes_on_being_read(engine, change, tmp_path):
    with closing(build(write(tmp_path / "whole.beton"), engine)) as loader:
        expected = [pixels_of(loader.epoch(epoch)) for epoch in (0, 1)]
    path = write(tmp_path / "x.beton")
    with closing(build(path, engine)) as loader:
        batches = loader.epoch(0)
        found = pixels_of([next(batches)])
        if change == "removed":
            path.unlink()
        else:
            write(tmp_path / "other.beton", seed=1).rename(path)
        found += pixels_of(batches)
        assert [torch.equal(a, b) for a, b in zip(found, expected[0], strict=True)] == [True] * 24
        assert all(torch.equal(a, b) for a, b in zip(pixels_of(loader.epoch(1)), expected[1], strict=True))


@pytest.mark.parametrize("engine", READING_ENGINES)
@pytest.mark.parametrize("content", ["other images", "zeros"])
def test_no_batch_of_a_file_that_was_overwritten_is_given(engine, content, tmp_path):
    with closing(build(write(tmp_path / "whole.beton"), engine)) as loader:
        expected = pixels_of(loader.epoch(0))
    path = write(tmp_path / "x.beton")
    other = write(tmp_path / "other.beton", seed=1).read_bytes()
    found = []
    with closing(build(path, engine)) as loader:
        batches = loader.epoch(0)
        found += pixels_of([next(batches), next(batches)])
        with path.open("r+b") as file:
            file.write(other if content == "other images" else other[:8000].ljust(len(other), b"\0"))
        with pytest.raises(DataChangedError, match=r"x\.beton: was written to while in use: restore it"):
            found.extend(torch.stack(batch.views).clone() for batch in batches)
        assert 2 <= len(found) < len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
        with pytest.raises(DataChangedError):
            next(loader.epoch(1))


def test_a_file_that_is_cut_short_between_batches(tmp_path):
    path = write(tmp_path / "x.beton")
    with closing(build(path, "torch")) as loader:  # it decodes only when a batch is asked for
        batches = loader.epoch(0)
        next(batches)
        num_bytes = path.stat().st_size
        os.truncate(path, num_bytes // 2)
        with pytest.raises(DataChangedError, match=f"went from {num_bytes} to {num_bytes // 2} bytes while in use"):
            next(batches)


def test_resident_needs_the_file_only_until_it_is_loaded(tmp_path):
    path = write(tmp_path / "x.beton")
    with closing(build(path, "resident")) as loader:
        expected = pixels_of(loader.epoch(0))
        path.write_bytes(b"")
        assert all(torch.equal(a, b) for a, b in zip(pixels_of(loader.epoch(0)), expected, strict=True))


@pytest.mark.parametrize("engine", [*READING_ENGINES, "resident"])
def test_an_evaluation_ends_where_its_file_was_overwritten(engine, tmp_path):
    path = write(tmp_path / "x.beton")
    loader = build_eval_loader(BetonReader(path), VIEWS, local_batch_size=BATCH_SIZE, engine=engine, device=CPU)
    with closing(loader):
        batches = iter(loader)
        next(batches)
        os.utime(path)
        with pytest.raises(DataChangedError, match=r"x\.beton: was written to"):
            list(batches)


@pytest.mark.parametrize(("engine", "as_jpegs"), [("ffcv", True), ("ffcv", False), ("dali", True), ("torch", False)])
def test_a_map_that_cannot_be_read_ends_the_process_with_one_line(engine, as_jpegs, tmp_path):
    path = write(tmp_path / "x.beton", as_jpegs=as_jpegs)
    command = [sys.executable, "-c", CUT_SHORT, str(path), engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("0\n")
    assert done.stderr.startswith(f"fastssl: error: {path}: was cut short, or cannot be read any more: restore it")
    assert done.stderr.count("\n") == 1


def test_other_bus_errors_are_as_they_were(tmp_path):
    """The default action of a SIGBUS that has nothing to do with a .beton file: the process is killed."""
    code = """
import mmap, sys
from pathlib import Path
from pipelines.beton import BetonReader
from pipelines.beton.bus_error import report_bus_errors
reader = BetonReader(sys.argv[1])
report_bus_errors(reader)
with Path(sys.argv[2]).open("w+b") as file:
    file.truncate(8192)
    pages = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    pages[5000]
"""
    command = [sys.executable, "-c", code, str(write(tmp_path / "x.beton")), str(tmp_path / "other")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (-7, "")
