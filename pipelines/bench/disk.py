"""Measures how fast a .beton file is read from disk, without the page cache: in epoch order and sequentially."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.beton import BetonReader
from pipelines.read_ahead import ReadAhead
from pipelines.sampler import epoch_order

_SEQUENTIAL_BYTES = 4 << 20  # size of one read
_MAX_CACHED_FRACTION = 0.05  # above this, memory is measured instead of the disk

Range = tuple[int, int]  # (offset, number of bytes)


@dataclass(frozen=True)
class DiskSpeed:
    """Result of one way of reading."""

    bytes_per_s: float | None  # None: not measured
    img_per_s: float | None
    note: str  # why it was not measured; empty if it was


def measure_disk(path: Path, *, seed: int, num_threads: int, seconds: float) -> tuple[DiskSpeed, DiskSpeed]:
    """Measure reading the images' bytes in epoch order, then sequentially, each for at most `seconds`.

    Before each measurement, the file is dropped from the page cache. Caches of the disk itself, or of the host of a
    virtual machine, are not emptied.

    Args:
        path: The .beton file. Any process that has it mapped keeps its pages in memory.
        seed: Seed of the epoch's order.
        num_threads: Threads that read in epoch order, one image at a time each, together with the loader's own
            read-ahead. The sequential measurement uses one thread.
        seconds: Maximum length of each measurement, > 0.
    Returns:
        (speed in epoch order, sequential speed)
    Raises:
        DataError: not a .beton file.
    """
    return _epoch_order(path, seed, num_threads, seconds), _sequential(path, seconds)


def _epoch_order(path: Path, seed: int, num_threads: int, seconds: float) -> DiskSpeed:
    """Measure reading in epoch order, with the loader's own read-ahead."""
    if reason := drop_from_cache(path):  # before the reader maps the file
        return _not_measured(reason)
    reader = BetonReader(path)
    order = epoch_order(np.arange(reader.num_samples), seed, 0)
    with closing(ReadAhead(reader, order, None, drop_behind=False)) as read_ahead:

        def images() -> Iterator[Range]:
            for position, i in enumerate(order.tolist()):
                read_ahead.begin(position)
                yield int(reader.data_ptr[i]), int(reader.data_bytes[i])

        return _measure(path, images(), num_threads, seconds, float(reader.data_bytes.mean()))


def _sequential(path: Path, seconds: float) -> DiskSpeed:
    if reason := drop_from_cache(path):
        return _not_measured(reason)
    reader = BetonReader(path)
    first, end = int(reader.data_ptr.min()), int((reader.data_ptr + reader.data_bytes).max())
    blocks = ((at, min(_SEQUENTIAL_BYTES, end - at)) for at in range(first, end, _SEQUENTIAL_BYTES))
    return _measure(path, blocks, 1, seconds, float(reader.data_bytes.mean()))


def _not_measured(reason: str) -> DiskSpeed:
    return DiskSpeed(None, None, f"not measured: {reason}")


def _measure(path: Path, waiting: Iterator[Range], num_threads: int, seconds: float, mean_bytes: float) -> DiskSpeed:
    lock, file = threading.Lock(), os.open(path, os.O_RDONLY)
    try:
        start_s = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            tasks = [pool.submit(_read, file, waiting, lock, start_s + seconds) for _ in range(num_threads)]
            num_bytes = sum(task.result() for task in tasks)
        elapsed_s = time.perf_counter() - start_s
    finally:
        os.close(file)
    return DiskSpeed(num_bytes / elapsed_s, num_bytes / elapsed_s / mean_bytes, "")


def _read(file: int, waiting: Iterator[Range], lock: threading.Lock, until_s: float) -> int:
    """Read ranges until none are left or the time is up; returns the number of bytes read."""
    num_bytes = 0
    while time.perf_counter() < until_s or not num_bytes:
        with lock:
            at, size = next(waiting, (0, 0))
        if not size:
            break
        num_bytes += len(os.pread(file, size, at))
    return num_bytes


def drop_from_cache(path: Path) -> str | None:
    """Drop a file's pages from the page cache, after writing modified pages to disk.

    Returns:
        None, or the reason why the file is still in memory.
    """
    if not hasattr(os, "posix_fadvise"):
        return "this system cannot drop a file from the page cache"
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        return f"the file could not be dropped from the page cache ({error.strerror})"
    finally:
        os.close(file)
    cached = cached_fraction(path)
    if cached > _MAX_CACHED_FRACTION:
        return (
            f"the file could not be dropped from the page cache, {cached:.0%} of it stayed: another program has it "
            "mapped, or its file system lies in memory"
        )
    return None


def cached_fraction(path: Path) -> float:
    """Fraction of a file's pages in the page cache (mincore, which reports all pages of a file we may not write)."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ) as mapped:
        states = np.zeros(-(-num_bytes // mmap.PAGESIZE), np.uint8)
        pages = np.frombuffer(mapped, np.uint8)
        status = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(num_bytes), ctypes.c_void_p(states.ctypes.data)
        )
        del pages  # the map cannot be closed while this view exists
    if status:
        raise OSError(ctypes.get_errno(), "mincore")
    return float((states & 1).mean())
