"""How fast a .beton comes from its disk, without the page cache: in the order of an epoch, and from end to end."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.beton import BetonReader
from pipelines.read_ahead import ReadAhead
from pipelines.sampler import epoch_order

_SEQUENTIAL_BYTES = 4 << 20  # of one read
_MAX_CACHED_FRACTION = 0.05  # more, and it is memory that is measured

Range = tuple[int, int]  # offset and number of bytes


@dataclass(frozen=True)
class DiskSpeed:
    """What reading one way gave."""

    bytes_per_s: float | None  # None: not measured
    img_per_s: float | None
    note: str  # why not; empty where it was


def measure_disk(path: Path, *, seed: int, num_threads: int, seconds: float) -> tuple[DiskSpeed, DiskSpeed]:
    """Read the images' bytes for at most `seconds`, or the whole file: as an epoch does, then one after the other.

    Before each, the page cache is emptied of this file. The caches of the disk itself, or of a host of virtual
    machines, are not.

    Args:
        path: The .beton file. Who has it mapped keeps its pages in memory.
        seed: Of the epoch's order.
        num_threads: Threads that read in the epoch's order, each an image at a time, behind the loader's own reading
            ahead; in sequence it is one.
        seconds: Length of each measurement, > 0.
    Returns:
        (in the order of an epoch, sequentially)
    Raises:
        DataError: not a .beton file.
    """
    return _epoch_order(path, seed, num_threads, seconds), _sequential(path, seconds)


def _epoch_order(path: Path, seed: int, num_threads: int, seconds: float) -> DiskSpeed:
    """With the loader's own reading ahead."""
    if reason := drop_from_cache(path):  # before the reader maps the file
        return _not_measured(reason)
    reader = BetonReader(path)
    order = epoch_order(np.arange(reader.num_samples), seed, 0)
    with ReadAhead(reader, order, None, drop_behind=False) as read_ahead:

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
    """Read ranges until there are no more or it is time; returns the bytes read."""
    num_bytes = 0
    while time.perf_counter() < until_s or not num_bytes:
        with lock:
            at, size = next(waiting, (0, 0))
        if not size:
            break
        num_bytes += len(os.pread(file, size, at))
    return num_bytes


def drop_from_cache(path: Path) -> str | None:
    """Drop a file's pages from the page cache, after what was changed there is written to the disk.

    Returns:
        None, or why the file is still in memory.
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
    """Share of a file's pages that are in the page cache (mincore; of a file that one may not write it says all)."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ) as mapped:
        states = np.zeros(-(-num_bytes // mmap.PAGESIZE), np.uint8)
        pages = np.frombuffer(mapped, np.uint8)
        status = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(num_bytes), ctypes.c_void_p(states.ctypes.data)
        )
        del pages  # the map cannot be closed before
    if status:
        raise OSError(ctypes.get_errno(), "mincore")
    return float((states & 1).mean())
