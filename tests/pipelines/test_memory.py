"""The loader's memory: the same after many epochs, and bounded by what is in flight, not by batch x largest image."""

# B local batch, V views, S their side

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from tests.helpers.processes import ROOT

MEBIBYTE = 2**20
NUM_THREADS, PREFETCH_BATCHES, BATCH_SIZE, NUM_VIEWS = 2, 3, 64, 2
HUGE_PX = (3000, 4000)
HUGE_BYTES = HUGE_PX[0] * HUGE_PX[1] * 3
# What the allocator keeps of freed memory, and the touched pages of the memory map (some 1 MiB of JPEGs).
SLACK_BYTES = 24 * MEBIBYTE

# Runs epochs over the first file to load all code, then over the second one; prints bytes as JSON: the resident set
# before the second, its peak from there on, and the resident set after each epoch. Linux resets the peak on demand.
CHILD = """
import json, sys
from pathlib import Path
import torch
from pipelines.loader import DataConfig, build_loader, open_train_images
from pipelines.views import ViewsConfig

def read_bytes(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

def run(beton, num_epochs):
    cfg = DataConfig(train=beton, global_batch_size=batch_size, num_workers=num_threads, prefetch_batches=prefetch)
    places = dict(seed=0, rank=0, world_size=1, device=torch.device("cpu"), num_threads=num_threads)
    loader = build_loader(open_train_images(cfg), cfg, ViewsConfig(recipe="byol", size_px=size_px), **places)
    resident = []
    for epoch in range(num_epochs):
        for batch in loader.epoch(epoch):
            pass
        resident.append(read_bytes("VmRSS"))
    loader.close()
    return resident

warm_up, beton, num_epochs, size_px, batch_size, num_threads, prefetch = json.loads(sys.argv[1])
run(warm_up, 2)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = read_bytes("VmRSS")
resident = run(beton, num_epochs)
assert "ffcv" not in sys.modules  # its import sets the thread counts of torch and numba
print(json.dumps({"before": before, "peak": read_bytes("VmHWM"), "resident": resident}))
"""


def encode(height_px: int, width_px: int, seed: int, *, progressive: bool = False) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, progressive=progressive)
    return file.getvalue()


def write_beton(path: Path, sizes_px: list[tuple[int, int]], *, progressive: bool = False) -> Path:
    with BetonWriter(path, len(sizes_px)) as writer:
        for seed, (height_px, width_px) in enumerate(sizes_px):
            data = encode(height_px, width_px, seed, progressive=progressive)
            writer.write_jpeg(data, height_px=height_px, width_px=width_px, label=0)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """As many images of 60 x 80 px as a batch has."""
    return write_beton(tmp_path_factory.mktemp("memory") / "small.beton", [(60, 80)] * BATCH_SIZE)


def run_epochs(warm_up: Path, beton: Path, *, num_epochs: int, size_px: int) -> dict:
    settings = [str(warm_up), str(beton), num_epochs, size_px, BATCH_SIZE, NUM_THREADS, PREFETCH_BATCHES]
    command = [sys.executable, "-c", CHILD, json.dumps(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_is_flat_over_twenty_epochs(small, tmp_path):
    """The resident set grows by less than 4 MiB from the end of epoch 3 to the end of epoch 20.

    A quarter of a MiB lost in each epoch would show; one batch has 3.4 MiB of levels and 13.5 MiB of floats. They are
    below 32 MiB on purpose: larger blocks go back to the system when they are freed, whatever the allocator does.
    """
    rng = np.random.default_rng(0)
    sizes_px = [(int(height_px), int(width_px)) for height_px, width_px in rng.integers(100, 500, (2 * BATCH_SIZE, 2))]
    beton = write_beton(tmp_path / "many.beton", sizes_px)
    resident = run_epochs(small, beton, num_epochs=20, size_px=96)["resident"]
    assert len(resident) == 20
    assert max(resident[3:]) - resident[2] < 4 * MEBIBYTE, resident


@pytest.mark.parametrize("progressive", [False, True])
def test_memory_is_bounded_by_threads_and_batches_in_flight(progressive, small, tmp_path):
    """One image of 12 megapixels among 63 small ones costs a decode buffer a thread, not one a sample of the batch.

    The bound: threads x (3 bytes a pixel of the largest image; 6 more, while it decodes, if that is a progressive
    JPEG, of which libjpeg keeps every coefficient) + (prefetched batches + 1) x B x V x S x S x 3 bytes of levels
    + 3 batches of float32 pixels (12 bytes a pixel: made, handed over, and held by the loop) + slack.
    """
    size_px = 32
    beton = write_beton(tmp_path / "huge.beton", [HUGE_PX] + [(60, 80)] * (BATCH_SIZE - 1), progressive=progressive)
    found = run_epochs(small, beton, num_epochs=8, size_px=size_px)
    above = found["peak"] - found["before"]
    pixels = BATCH_SIZE * NUM_VIEWS * size_px**2
    bound = NUM_THREADS * HUGE_BYTES * (3 if progressive else 1)
    bound += (PREFETCH_BATCHES + 1) * 3 * pixels + 3 * 12 * pixels + SLACK_BYTES
    assert above < bound, (above, bound)
    assert above > 0.9 * HUGE_BYTES  # the image was decoded, and the peak shows it
    assert bound < BATCH_SIZE * HUGE_BYTES / 8  # far from what a buffer a sample would take


NUM_IMAGENET = 1_281_167
INDEX_BYTES = 100_000_000
# Prints how much the resident set grew by an open file of many samples and the engine on it, after a few batches.
INDEX_CHILD = """
import sys
import numpy as np
import psutil
import torch
from pipelines.beton import BetonReader
from pipelines.engines import build_engine
from pipelines.views import ViewsConfig, build_view_specs, size_groups
from tests.helpers.plans import draw_of, plan_batches

specs = build_view_specs(ViewsConfig(recipe="simclr", size_px=32))

def open_and_read(beton):
    reader = BetonReader(beton)
    engine = build_engine("ffcv", reader, num_workers=2, prefetch_batches=2, device=torch.device("cpu"))
    order = np.random.default_rng(0).permutation(reader.num_samples)
    labels = []
    plans = plan_batches(draw_of(specs), order, reader, 64)
    for batch in engine.batches(plans, 64, size_groups(specs)):
        labels.append(batch.labels.copy())
        if len(labels) == 4:
            break
    assert np.array_equal(np.concatenate(labels), order[:256] % 1000)
    return reader, engine

warm_up, beton = sys.argv[1:]
open_and_read(warm_up)
before = psutil.Process().memory_info().rss
kept = open_and_read(beton)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
def test_index_of_as_many_images_as_imagenet_has(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4096, 2, 2, 3), dtype=np.uint8)
    for name, num_samples in (("warm_up", 256), ("many", NUM_IMAGENET)):
        with BetonWriter(tmp_path / f"{name}.beton", num_samples) as writer:
            for i in range(num_samples):
                writer.write_raw(pixels[i % len(pixels)], label=i % 1000)
    reader = BetonReader(tmp_path / "many.beton")
    assert reader.num_samples == NUM_IMAGENET
    np.testing.assert_array_equal(reader.decode(NUM_IMAGENET - 1), pixels[(NUM_IMAGENET - 1) % len(pixels)])
    assert reader.sidecar["num_images"] == NUM_IMAGENET
    arrays = [value for value in vars(reader).values() if isinstance(value, np.ndarray) and value is not reader.mmap]
    assert sum(array.nbytes for array in arrays) < INDEX_BYTES / 2

    command = [sys.executable, "-c", INDEX_CHILD, tmp_path / "warm_up.beton", tmp_path / "many.beton"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < INDEX_BYTES
