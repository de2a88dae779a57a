"""Read-ahead, seen in the page cache itself."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines import read_ahead
from pipelines.beton import BetonReader, BetonWriter
from pipelines.errors import DataError
from pipelines.read_ahead import ReadAhead, available_memory_bytes, read_whole

NUM_IMAGES, SIDE_PX = 60, 300  # of 270 kB: what the system reads around one does not reach another a few further on


@pytest.fixture
def reader(tmp_path: Path) -> BetonReader:
    """A file of raw images that is not in the page cache."""
    with BetonWriter(tmp_path / "x.beton", NUM_IMAGES) as writer:
        for i in range(NUM_IMAGES):
            writer.write_raw(np.full((SIDE_PX, SIDE_PX, 3), i, np.uint8))
    reader = BetonReader(tmp_path / "x.beton")
    forget(reader)
    if cached(reader).any():
        pytest.skip("the file system does not let go of its pages")
    return reader


def forget(reader: BetonReader) -> None:
    with reader.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(reader: BetonReader) -> np.ndarray:
    """Which images lie in the page cache (their middle), bool [N]. To read with RWF_NOWAIT would start to read them."""
    pages = np.zeros(-(-len(reader.mmap) // mmap.PAGESIZE), np.uint8)
    places = ctypes.c_void_p(reader.mmap.ctypes.data), ctypes.c_size_t(len(reader.mmap))
    assert ctypes.CDLL(None).mincore(*places, ctypes.c_void_p(pages.ctypes.data)) == 0
    middle = (reader.data_ptr + reader.data_bytes // np.uint64(2)).astype(np.int64)
    return pages[middle // mmap.PAGESIZE] & 1 > 0


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, "the page cache is not as it should be"
        time.sleep(0.01)


@pytest.fixture
def groups_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_RANDOM_GROUP_BYTES", 4 * 3 * SIDE_PX**2)


def test_a_group_and_the_next_are_asked_for(reader, groups_of_four):
    ids = np.arange(0, NUM_IMAGES, 3)[::-1].copy()  # apart from each other, and not in the order of the file
    with closing(ReadAhead(reader, ids, None, drop_behind=False)) as ahead:
        ahead.begin(0)
        wait_until(lambda: bool(cached(reader)[ids[:8]].all()))
        assert not cached(reader)[ids[8:]].any()
        ahead.begin(3)
        ahead.begin(4)
        wait_until(lambda: bool(cached(reader)[ids[:12]].all()))
        assert not cached(reader)[ids[12:]].any()
        for position in range(5, len(ids)):
            ahead.begin(position)
        wait_until(lambda: bool(cached(reader)[ids].all()))
    assert cached(reader).sum() < NUM_IMAGES / 2


def test_what_was_used_is_dropped(reader, groups_of_four):
    ids = np.arange(0, NUM_IMAGES, 3)
    with closing(ReadAhead(reader, ids, None, drop_behind=True)) as ahead:
        ahead.begin(0)
        wait_until(lambda: bool(cached(reader)[ids[:8]].all()))
        assert int(reader.mmap.sum(dtype=np.int64)) > 0  # the whole file is mapped now, and cached
        assert cached(reader).all()
        ahead.end(3)
        ahead.end(7)
        wait_until(lambda: not cached(reader)[ids[:4]].any())
        assert cached(reader)[ids[4:]].all()
    np.testing.assert_array_equal(reader.decode(0), 0)
    np.testing.assert_array_equal(reader.decode(9), 9)


def test_a_window_is_a_group(reader):
    windows = np.repeat([1, 0, 2], NUM_IMAGES // 3)
    ids = np.argsort(windows, kind="stable")
    with closing(ReadAhead(reader, ids, windows, drop_behind=True)) as ahead:
        ahead.begin(0)
        wait_until(lambda: bool(cached(reader)[windows < 2].all()))
        assert not cached(reader)[-10:].any()
        ahead.begin(20)
        wait_until(lambda: bool(cached(reader).all()))
        ahead.end(20)
        wait_until(lambda: not cached(reader)[windows == 0][1:-1].any())
        assert cached(reader)[windows != 0].mean() > 0.9


def test_what_lies_in_the_cache_is_not_asked_for(reader, monkeypatch):
    read_whole(reader)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments))
    with closing(ReadAhead(reader, np.arange(NUM_IMAGES), None, drop_behind=False)) as ahead:
        ahead.begin(0)
        ahead._thread.shutdown(wait=True)
    assert asked == []


def test_no_samples_are_no_groups(reader):
    with closing(ReadAhead(reader, np.arange(0), None, drop_behind=True)) as ahead:
        ahead.begin(0)
        ahead.end(5)
    assert not cached(reader).any()


def test_leaving_does_not_wait_for_what_has_not_begun(reader, groups_of_four, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: time.sleep(0.05))
    start_s = time.monotonic()
    with closing(ReadAhead(reader, np.arange(0, NUM_IMAGES, 3), None, drop_behind=False)) as ahead:
        for position in range(NUM_IMAGES // 3):
            ahead.begin(position)
    assert time.monotonic() - start_s < 0.5


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_file_is_read_whole(reader, num_ranks):
    for rank in range(num_ranks):
        is_before = reader.data_ptr + reader.data_bytes < len(reader.mmap) * rank // num_ranks
        assert cached(reader)[is_before].all()
        assert cached(reader).sum() <= is_before.sum() + 2  # one more, and what the system reads ahead by itself
        read_whole(reader, rank, num_ranks)
    assert cached(reader).all()


def test_a_file_larger_than_memory_is_refused(reader, monkeypatch):
    monkeypatch.setattr(read_ahead, "available_memory_bytes", lambda: 10**7)
    with pytest.raises(
        DataError, match=r"data\.cache=ram: .*x\.beton has 0\.0 GB, 0\.0 GB of memory are free"
    ) as caught:
        read_whole(reader)
    assert "\n" not in str(caught.value)


def test_a_containers_limit_counts(tmp_path):
    free = psutil.virtual_memory().available
    assert 0.5 < available_memory_bytes(tmp_path) / free < 1.5  # no limit there
    stat = "anon 5\nfile 9\ninactive_file 3000\nactive_file 500\n"
    for folder, limit, used in (
        (tmp_path, "memory.max", "memory.current"),
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / limit).write_text("100000\n")
        (folder / used).write_text("60000\n")
        (folder / "memory.stat").write_text(stat)
        assert available_memory_bytes(tmp_path) == 43_500
        (folder / limit).write_text("max\n" if folder == tmp_path else f"{2**63 - 4096}\n")
        assert 0.5 < available_memory_bytes(tmp_path) / free < 1.5
