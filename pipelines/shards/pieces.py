"""Reads consecutive samples of a shard: from a memory map, or by ranges from object storage."""

# n samples

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from pipelines.beton.bus_error import report_bus_errors
from pipelines.beton.format import MAX_LABEL
from pipelines.errors import DataError
from pipelines.files import check_state, opened_with, read_records, state_of
from pipelines.page_cache import MAX_GAP_BYTES, NUM_PROBES, drop_pages, is_cached
from pipelines.remote.cache import BlockCache
from pipelines.remote.store import RemoteError, RemoteStore
from pipelines.shards.manifest import Manifest, Shard
from pipelines.shards.rows import HEAD_BYTES, ROW, first_bad_row, num_bytes_of, row_crc32, rows_path

T = TypeVar("T")
Span: TypeAlias = tuple[int, int, int]  # shard, and its first sample and the one after the last

WRONG_CHECKSUM = "has another checksum than its rows file says"
_NUM_FETCHES = 3  # of a range whose bytes turn out to be wrong


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of one shard, with their bytes in memory.

    Attributes:
        rows: ROW [n].
        addresses: uint64 [n], where the bytes of each image begin.
        owners: What keeps the memory valid.
        damaged: Position and reason of each image whose stored bytes are not those that were converted.
    """

    rows: np.ndarray
    addresses: np.ndarray
    owners: tuple[object, ...]
    damaged: dict[int, str] = field(default_factory=dict)


class LocalFiles:
    """Memory maps of local shards, opened when they are first needed.

    The checksums of images are not compared, as for a single file: the decoder finds damage, `fastssl verify`
    all of it.

    Attributes:
        folder: Where the shards are.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._shards = folder, manifest.shards
        self._maps: dict[int, _Maps] = {}
        self._lock = threading.Lock()
        self._is_over = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastssl-read-ahead")

    def read(self, shard: int, first: int, stop: int) -> Piece:
        """Samples first..stop-1 of a shard.

        Raises:
            DataError: the shard is missing, cut short, or not the one of the manifest.
        """
        found = self.maps(shard)
        rows = found.rows(first, stop)
        return Piece(rows, rows["ptr"] + found.address, (found.mmap,))

    def rows(self, shard: int, first: int, stop: int) -> np.ndarray:
        """Rows of the samples first..stop-1 of a shard, ROW [n]; their checksums are not compared."""
        return self.maps(shard).rows(first, stop)

    def will_need(self, spans: Sequence[Span]) -> None:
        """Ask the system, in a thread, for these samples, unless they seem to be in the page cache already."""
        if spans:
            self._thread.submit(self._ask, spans)

    def drop(self, spans: Sequence[Span]) -> None:
        """Drop the pages of these samples from the page cache, in a thread."""
        self._thread.submit(self._drop, spans)

    def _ask(self, spans: Sequence[Span]) -> None:
        if all(map(self._is_cached, spans[:: -(-len(spans) // NUM_PROBES)])):
            return
        for shard, first, stop in spans:
            if self._is_over:
                return
            rows, found = self.rows(shard, first, stop), self.maps(shard)
            for start, end, _ in _ranges(rows, num_bytes_of(rows)):
                os.posix_fadvise(found.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def _is_cached(self, span: Span) -> bool:
        """Whether the middle of a sample is in the page cache."""
        shard, middle = span[0], (span[1] + span[2]) // 2
        rows = self.rows(shard, middle, middle + 1)
        return is_cached(self.maps(shard).descriptor, [int(rows["ptr"][0]) + int(num_bytes_of(rows)[0]) // 2])

    def _drop(self, spans: Sequence[Span]) -> None:
        for shard, first, stop in spans:
            if self._is_over:
                return
            rows, found = self.rows(shard, first, stop), self.maps(shard)
            for start, end, _ in _ranges(rows, num_bytes_of(rows)):
                drop_pages(found.descriptor, found.file_map, start, end)

    def check_unchanged(self, shards: Sequence[int] | None = None) -> None:
        """Raise DataChangedError if one of these shards has changed since it was opened; None: any."""
        with self._lock:
            opened = list(self._maps.values()) if shards is None else [self._maps.get(shard) for shard in shards]
        for found in opened:
            if found is not None:
                found.check_unchanged()

    def close(self) -> None:
        """Maps are closed with the last array of them."""
        self._is_over = True
        self._thread.shutdown(cancel_futures=True)

    def map(self, work: Callable[[int], T], numbers: Iterable[int]) -> Iterator[tuple[int, T]]:
        """Work on some numbers, one after the other: a map does not wait for requests."""
        return ((number, work(number)) for number in numbers)

    def maps(self, shard: int) -> _Maps:
        """The maps of one shard.

        Raises:
            DataError: it is missing, or not the one of the manifest.
        """
        found = self._maps.get(shard)
        if found is None:
            with self._lock:
                found = self._maps.get(shard)
                if found is None:
                    found = self._maps[shard] = _Maps(self.folder, self._shards[shard])
        return found


class _Maps:
    """One shard, mapped, and its open rows file; not to be changed while in use.

    Attributes:
        path: The shard.
        mmap: uint8, the whole file.
        file_map: What `mmap` is a view of.
        address: Of its first byte.
        descriptor: The open file.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.name
        self._shard, self._rows_path = shard, rows_path(self.path)
        try:
            self.descriptor, self._rows_descriptor = opened_with(self, self.path), opened_with(self, self._rows_path)
            self._state = state_of(self.descriptor)
            num_rows = state_of(self._rows_descriptor)[0] / ROW.itemsize
            if self._state[0] != shard.num_bytes:
                raise _not_the_one(self.path, f"{self._state[0]:,} bytes instead of {shard.num_bytes:,}")
            if num_rows != shard.num_images:
                raise _not_the_one(self._rows_path, f"{num_rows:g} rows instead of {shard.num_images:,}")
            self.file_map = mmap(self.descriptor, 0, access=ACCESS_READ)
            self.mmap = np.frombuffer(self.file_map, np.uint8)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: no such file, but the manifest of its data set lists it") from error
        except OSError as error:
            raise DataError(f"{error.filename or self.path}: cannot be read ({error.strerror})") from error
        self.address = np.uint64(self.mmap.ctypes.data)
        report_bus_errors(self)

    def rows(self, first: int, stop: int) -> np.ndarray:
        """Rows of the samples first..stop-1, ROW [n]."""
        rows = read_records(self._rows_descriptor, ROW, first * ROW.itemsize, stop - first)
        if rows is None:
            raise _not_the_one(self._rows_path, "cut short")
        if (wrong := _what_is_wrong(rows, self._shard, first)) is not None:
            raise _not_the_one(self._rows_path, wrong)
        return rows

    def some_rows(self, samples: np.ndarray, *, keep: bool) -> np.ndarray:
        """Rows of some samples, ROW [n]; `keep`: all rows of the shard, 24 bytes a sample, stay in memory."""
        if keep:
            return self._all_rows[samples]
        rows = np.empty(len(samples), ROW)
        stored = rows.view(np.uint8).reshape(-1, ROW.itemsize)
        for position, sample in enumerate(samples.tolist()):
            if os.preadv(self._rows_descriptor, [stored[position].data], sample * ROW.itemsize) != ROW.itemsize:
                raise _not_the_one(self._rows_path, "cut short")
        if (bad := first_bad_row(rows, self._shard.num_bytes, MAX_LABEL)) is not None:
            raise _not_the_one(self._rows_path, f"row {samples[bad]} describes no image of the file")
        return rows

    @cached_property
    def _all_rows(self) -> np.ndarray:
        return self.rows(0, self._shard.num_images)

    def check_unchanged(self) -> None:
        """See `ImageSet.check_unchanged`."""
        check_state(self.path, self.descriptor, self._state)


class RemoteFiles:
    """Shards under a URL, read by ranges; every image's checksum is compared."""

    def __init__(self, store: RemoteStore, manifest: Manifest, cache: BlockCache | None, num_threads: int = 16) -> None:
        self.store, self._shards, self._cache = store, manifest.shards, cache
        # A task of these threads waits for requests of the store, whose own threads must not wait for each other.
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-fetch")

    def map(self, work: Callable[[int], T], numbers: Iterable[int]) -> Iterator[tuple[int, T]]:
        """Work on some numbers side by side; results in order."""
        listed = list(numbers)
        return zip(listed, self._threads.map(work, listed), strict=True)

    def submit(self, shard: int, first: int, stop: int) -> Future[Piece]:
        """`read` in a thread."""
        return self._threads.submit(self.read, shard, first, stop)

    def read(self, shard: int, first: int, stop: int) -> Piece:
        """As `LocalFiles.read`. Bytes that are wrong are fetched again; what stays wrong is damaged."""
        for num_tries in range(1, _NUM_FETCHES + 1):
            piece = self._read_once(shard, first, stop)
            if not piece.damaged or num_tries == _NUM_FETCHES:
                return piece
            self._forget(shard, first, stop, piece.rows)
            self.store.retries["wrong checksum"] += 1
        raise AssertionError

    def rows(self, shard: int, first: int, stop: int) -> np.ndarray:
        """As `LocalFiles.rows`."""
        found, about = self._get(shard, True, first * ROW.itemsize, stop * ROW.itemsize), self._shards[shard]
        rows = np.frombuffer(found, ROW)
        if _what_is_wrong(rows, about, first) is None:
            return rows
        self._forget_range(shard, True, first * ROW.itemsize, stop * ROW.itemsize)
        self.store.retries["wrong checksum"] += 1
        rows = np.frombuffer(self._get(shard, True, first * ROW.itemsize, stop * ROW.itemsize), ROW)
        if (wrong := _what_is_wrong(rows, about, first)) is not None:
            raise _not_the_one(f"{self.store.shown}/{about.name}.rows", wrong)
        return rows

    def close(self) -> None:
        """Cancel what is under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def _read_once(self, shard: int, first: int, stop: int) -> Piece:
        rows = self.rows(shard, first, stop)
        num_bytes = num_bytes_of(rows)
        addresses, buffers = np.zeros(len(rows), np.uint64), []
        damaged: dict[int, str] = {}
        for start, end, positions in _ranges(rows, num_bytes):
            buffer = np.frombuffer(self._get(shard, False, start, end), np.uint8)
            buffers.append(buffer)
            for position in positions.tolist():
                offset = int(rows["ptr"][position]) - start
                image = buffer[offset : offset + int(num_bytes[position])]
                addresses[position] = image.ctypes.data
                row = rows[position : position + 1].view(np.uint8)
                if row_crc32(row[:HEAD_BYTES].data, image.data) != rows["crc32"][position]:
                    damaged[position] = WRONG_CHECKSUM
        return Piece(rows, addresses, tuple(buffers), damaged)

    def _get(self, shard: int, of_rows: bool, start: int, stop: int) -> bytes:
        about = self._shards[shard]
        name = f"{about.name}.rows" if of_rows else about.name
        fetch = partial(self.store.get, name, start, stop, None if of_rows else about.etag)
        try:
            if self._cache is None:
                return fetch()
            return self._cache.get(self._key(shard, of_rows, start, stop), stop - start, fetch)
        except RemoteError as error:
            raise DataError(f"{error}; run.resume=auto resumes a training") from None

    def _key(self, shard: int, of_rows: bool, start: int, stop: int) -> str:
        return f"{self._shards[shard].rows_sha256} {'rows' if of_rows else 'images'} {start} {stop}"

    def _forget(self, shard: int, first: int, stop: int, rows: np.ndarray) -> None:
        self._forget_range(shard, True, first * ROW.itemsize, stop * ROW.itemsize)
        for start, end, _ in _ranges(rows, num_bytes_of(rows)):
            self._forget_range(shard, False, start, end)

    def _forget_range(self, shard: int, of_rows: bool, start: int, stop: int) -> None:
        if self._cache is not None:
            self._cache.forget(self._key(shard, of_rows, start, stop))


def _ranges(rows: np.ndarray, num_bytes: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Byte ranges that hold the images, with the positions of the images in each; one where they lie side by side."""
    order = np.argsort(rows["ptr"], kind="stable")
    starts = rows["ptr"].astype(np.int64)[order]
    ends = np.maximum.accumulate(starts + num_bytes[order])
    bounds = [0, *(np.flatnonzero(starts[1:] - ends[:-1] > MAX_GAP_BYTES) + 1).tolist(), len(rows)]
    return [(int(starts[a]), int(ends[b - 1]), order[a:b]) for a, b in pairwise(bounds) if b > a]


def _what_is_wrong(rows: np.ndarray, shard: Shard, first: int) -> str | None:
    """What shows that these rows, the first of which is `first`, are not the shard's; None: nothing.

    All rows of a shard are compared with the manifest's checksum, some of them are only looked at.
    """
    if (bad := first_bad_row(rows, shard.num_bytes, MAX_LABEL)) is not None:
        return f"row {first + bad} describes no image of the file"
    if len(rows) == shard.num_images and hashlib.sha256(rows.data).hexdigest() != shard.rows_sha256:
        return "other images or labels"
    return None


def _not_the_one(path: Path | str, what: str) -> DataError:
    return DataError(f"{path}: not the file of the manifest ({what}): copy it again, or write `fastssl manifest` again")
