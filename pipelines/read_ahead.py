"""Read-ahead for slow disks and files larger than memory: tells the system what is read next and what is not needed."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from pipelines.beton import BetonReader
from pipelines.errors import DataError
from pipelines.page_cache import MAX_GAP_BYTES, NUM_PROBES, drop_pages, is_cached
from pipelines.progress import Progress

_RANDOM_GROUP_BYTES = 64 << 20  # group size in random order: half a second of a disk that reads 128 MB/s
_READ_BYTES = 8 << 20


class ReadAhead:
    """Requests the samples of one epoch ahead of their use, group by group in file order; `close` ends it.

    A group is requested when the use of the previous one begins; groups that are already in the page cache are skipped.
    The request (posix_fadvise) returns before the data has arrived; reading waits for data that is still in transfer.
    """

    def __init__(
        self, reader: BetonReader, sample_ids: np.ndarray, windows: np.ndarray | None, *, drop_behind: bool
    ) -> None:
        """Divide the samples into groups.

        Args:
            reader: The open file.
            sample_ids: The samples of this rank in order, int64 [num].
            windows: `sampler.quasi_random_windows` of all samples, each a group; None: groups of about 64 MiB.
            drop_behind: Drop used samples from the page cache.
        """
        self._reader, self._ids, self._drop_behind = reader, sample_ids, drop_behind
        group = windows[sample_ids] if windows is not None else self._bytes_before() // _RANDOM_GROUP_BYTES
        inner = np.flatnonzero(np.diff(group)) + 1
        self._bounds = [0, *inner.tolist(), len(sample_ids)] if len(sample_ids) else []
        self._num_asked = self._num_dropped = 0
        self._is_over = False
        self._file = reader.descriptor
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastssl-read-ahead")

    def close(self) -> None:
        """Stop asking."""
        self._is_over = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def begin(self, position: int) -> None:
        """Called before sample number `position` of the order is read: requests its group and the next one."""
        while (
            not self._is_over
            and self._num_asked < len(self._bounds) - 1
            and self._bounds[max(self._num_asked - 1, 0)] <= position
        ):
            self._thread.submit(self._ask, self._num_asked)
            self._num_asked += 1

    def end(self, position: int) -> None:
        """Called when all samples before number `position` of the order have been used: drops their groups."""
        while self._drop_behind and self._num_dropped < len(self._bounds) - 1:
            if self._bounds[self._num_dropped + 1] > position:
                return
            self._thread.submit(self._drop, self._num_dropped)
            self._num_dropped += 1

    def _bytes_before(self) -> np.ndarray:
        ends = np.cumsum(self._reader.data_bytes[self._ids], dtype=np.int64)
        return ends - self._reader.data_bytes[self._ids].astype(np.int64)

    def _ask(self, group: int) -> None:
        if self._is_cached(group):
            return
        starts, stops = self._ranges(group)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if self._is_over:
                return
            os.posix_fadvise(self._file, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _drop(self, group: int) -> None:
        """Drop a group's pages."""
        starts, stops = self._ranges(group)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            if self._is_over:
                return
            drop_pages(self._file, self._reader.file_map, start, stop)

    def _is_cached(self, group: int) -> bool:
        """Whether some evenly spaced samples of a group are all in the page cache."""
        ids = self._ids_of(group)
        some = ids[:: -(-len(ids) // NUM_PROBES)]
        middle = self._reader.data_ptr[some] + self._reader.data_bytes[some] // np.uint64(2)
        return is_cached(self._file, middle.tolist())

    def _ranges(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Byte ranges of a group in the file: start and end offsets, int64, ascending; nearby ranges are merged."""
        ids = self._ids_of(group)
        starts = np.sort(self._reader.data_ptr[ids].astype(np.int64))
        stops = np.sort((self._reader.data_ptr[ids] + self._reader.data_bytes[ids]).astype(np.int64))
        far = np.flatnonzero(starts[1:] - stops[:-1] > MAX_GAP_BYTES) + 1
        return starts[np.append(0, far)], stops[np.append(far, len(stops)) - 1]

    def _ids_of(self, group: int) -> np.ndarray:
        return self._ids[self._bounds[group] : self._bounds[group + 1]]


def read_whole(reader: BetonReader, part: int = 0, num_parts: int = 1) -> None:
    """Load a file into the page cache; each process of a node reads a part.

    Args:
        reader: The open file.
        part: The part to read, in [0, num_parts).
        num_parts: Number of processes on the node.
    Raises:
        DataError: the file is larger than the available memory.
    """
    num_bytes, free_bytes = len(reader.mmap), available_memory_bytes()
    if num_bytes > free_bytes:
        raise DataError(
            f"data.cache=ram: {reader.path} has {num_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB of memory "
            f"are free; take os, or none with data.order=quasi_random"
        )
    start, stop = num_bytes * part // num_parts, num_bytes * (part + 1) // num_parts
    with Progress(f"reading {reader.path.name}", stop - start, unit="B") as progress:
        for first in range(start, stop, _READ_BYTES):
            progress.advance(len(reader.read(np.dtype(np.uint8), first, min(_READ_BYTES, stop - first))))


def available_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory available without swapping: that of the machine, or less if a container's limit applies.

    Args:
        cgroup: Folder where the kernel exposes the limit, of cgroups v2 or v1.
    """
    available = psutil.virtual_memory().available
    for folder, limit_name, used_name in (
        (cgroup, "memory.max", "memory.current"),
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = (folder / limit_name).read_text().strip() if (folder / limit_name).is_file() else "max"
        if limit != "max":
            entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            page_cache = int(entries["inactive_file"]) + int(entries["active_file"])  # reclaimed when memory is needed
            available = min(available, int(limit) - int((folder / used_name).read_text()) + page_cache)
    return max(available, 0)
