"""The disk is measured without the page cache, or it is said why not."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipelines.bench.disk import cached_fraction, drop_from_cache, measure_disk
from pipelines.beton import BetonWriter

NUM_IMAGES, IMAGE_BYTES = 300, 64 * 64 * 3


@pytest.fixture
def beton(tmp_path) -> Path:
    found = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True)
    if found.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("the temporary folder lies in memory: nothing can be dropped there")
    path = tmp_path / "x.beton"
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 64, 64, 3), dtype=np.uint8)
    with BetonWriter(path, NUM_IMAGES) as writer:
        for image in pixels:
            writer.write_raw(image, label=0)
    path.read_bytes()
    return path


def test_a_file_is_dropped_from_the_page_cache(beton):
    assert cached_fraction(beton) == 1
    assert drop_from_cache(beton) is None
    assert cached_fraction(beton) < 0.05


def test_what_is_mapped_elsewhere_is_not_measured_and_says_so(beton):
    mapped = np.memmap(beton, np.uint8, "r")
    assert int(mapped[::4096].sum()) > 0  # every page is touched
    in_epoch_order, sequential = measure_disk(beton, seed=0, num_threads=2, seconds=0.2)
    for speed in (in_epoch_order, sequential):
        assert speed.img_per_s is None
        assert speed.bytes_per_s is None
        assert speed.note.startswith(
            "not measured: the file could not be dropped from the page cache, 100% of it stayed"
        )
    del mapped


def test_reading_gives_images_and_bytes_a_second(beton):
    for speed in measure_disk(beton, seed=0, num_threads=2, seconds=0.2):
        assert speed.note == ""
        assert speed.img_per_s is not None
        assert speed.img_per_s > 0
        assert speed.bytes_per_s == pytest.approx(speed.img_per_s * IMAGE_BYTES)
    share_of_images = NUM_IMAGES * IMAGE_BYTES / beton.stat().st_size
    assert cached_fraction(beton) > 0.9 * share_of_images  # all was read


def test_a_system_that_cannot_drop_says_so(beton, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert drop_from_cache(beton) == "this system cannot drop a file from the page cache"
