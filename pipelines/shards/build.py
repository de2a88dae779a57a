"""Writes the manifest of a data set, and the rows of shards that have none; compares a data set with its manifest."""

# N samples of a shard

import hashlib
import os
import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from pipelines.beton.format import MAX_LABEL
from pipelines.beton.sidecar import MAX_SIDECAR_BYTES, parse_sidecar
from pipelines.beton.tables import BetonTables, truncated
from pipelines.errors import DataError
from pipelines.printable import printable
from pipelines.progress import Progress
from pipelines.remote.store import RemoteError
from pipelines.shards.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MAX_SHARDS,
    Manifest,
    Shard,
    why_no_name,
)
from pipelines.shards.rows import (
    HEAD_BYTES,
    MAX_IMAGE_BYTES,
    ROW,
    build_rows,
    first_bad_row,
    modes_of,
    num_bytes_of,
)
from pipelines.shards.store import ObjectInfo, Store

RANGE_BYTES = 8 << 20  # the images of a shard are read in ranges of at most this size
NUM_AHEAD = 2  # ranges per thread that are under way or waiting
_NUM_ASKED = 16  # requests at a time
NUM_NAMED = 5  # number of shards or images listed in a message
T = TypeVar("T")
R = TypeVar("R")
_NUMBERED = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.beton", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ManifestReport:
    """Report on a manifest that was written, or that its data set agrees with.

    Attributes:
        path: Path or URL of the manifest.
        num_shards: Number of .beton files.
        num_images: Number of images.
        num_raw: Number of images stored as raw pixels; all others are JPEGs.
        num_bytes: Size of all files.
        image_bytes: Sum of the stored images' bytes.
        num_classes: Number of class names; None: unknown.
        digest: See `Manifest.digest`.
        num_rows_written: Number of shards whose rows file was written.
        num_images_read: Number of images whose bytes were read.
    """

    path: str
    num_shards: int
    num_images: int
    num_raw: int
    num_bytes: int
    image_bytes: int
    num_classes: int | None
    digest: str
    num_rows_written: int
    num_images_read: int


def write_manifest(store: Store, *, verify: bool = False, num_threads: int | None = None) -> ManifestReport:
    """Write `dataset.json`, after the rows of shards that have none, or those of another file.

    Args:
        store: Where the shards are; all `*.beton` that are not in sub-folders, in the order of their names.
        verify: Read all images, and compare them with the checksums in their rows.
        num_threads: Number of threads; None: one per core.
    Raises:
        DataError: there is no shard, one of a numbered series is missing, two hold the same images, the names of the
            classes differ, a shard is damaged or its sidecar is of another file, or a file cannot be written.
    """
    files = {info.path: info for info in store.list()}
    shards = [info for name, info in sorted(files.items()) if name.endswith(".beton") and "/" not in name]
    _check_names(store, [info.path for info in shards])
    with _Examiner(store, files, verify=verify, num_threads=num_threads) as examiner:
        manifest = examiner.manifest(shards)
    text, where = manifest.to_json(), _where(store, MANIFEST_NAME)
    Manifest.from_json(text, where)  # what cannot be read is not written
    store.put(MANIFEST_NAME, text)
    return _report(where, manifest, examiner)


def manifest_of(store: Store, names: Sequence[str]) -> Manifest:
    """The manifest of some shards, in this order; writes nothing.

    Raises:
        DataError: see `write_manifest`; or a shard has no rows.
    """
    files = {info.path: info for info in store.list()}
    with _Examiner(store, files, verify=False, num_threads=None, is_check=True) as examiner:
        return examiner.manifest([files[name] for name in names])


def check_manifest(store: Store, *, verify: bool = False, num_threads: int | None = None) -> ManifestReport:
    """Compare a data set with its manifest; writes nothing. See `write_manifest`.

    Raises:
        DataError: no manifest, a damaged one, or shards are missing, new or not those that it describes.
    """
    where = _where(store, MANIFEST_NAME)
    files = _listed(store)
    if files is not None and MANIFEST_NAME not in files:
        raise DataError(f"{where}: no such file; write it with `fastssl manifest`")
    manifest = Manifest.from_json(store.get_whole(MANIFEST_NAME, MAX_MANIFEST_BYTES)[0], where)
    if files is None:
        files = _named(store, [shard.name for shard in manifest.shards])
    listed = {shard.name: shard for shard in manifest.shards}
    faults = {name: "is missing" for name in listed if name not in files}
    faults |= {
        name: "is not in it"
        for name in sorted(files)
        if name.endswith(".beton") and "/" not in name and name not in listed
    }
    for name, shard in listed.items():
        if name in files and (found := files[name].num_bytes) != shard.num_bytes:
            faults[name] = f"has {found:,} bytes instead of {shard.num_bytes:,}"
    _check_faults(where, faults)
    with _Examiner(store, files, verify=verify, num_threads=num_threads, is_check=True) as examiner:
        found = examiner.manifest([files[name] for name in listed])
    found = replace(found, shards=tuple(map(_same_place, found.shards, manifest.shards)))
    faults = {
        shard.name: "was replaced" if found_shard.rows_sha256 == shard.rows_sha256 else "holds other images or labels"
        for shard, found_shard in zip(manifest.shards, found.shards, strict=True)
        if found_shard != shard
    }
    _check_faults(where, faults)
    if found != manifest:
        raise DataError(
            f"{where}: does not match the class names or labels of the shards; write it again with `fastssl manifest`"
        )
    return _report(where, manifest, examiner)


def _listed(store: Store) -> dict[str, ObjectInfo] | None:
    """The files by name; None: a web server without a list of its files."""
    try:
        return {info.path: info for info in store.list()}
    except RemoteError:
        if store.shown.startswith("http"):
            return None
        raise


def _named(store: Store, shards: Sequence[str]) -> dict[str, ObjectInfo]:
    """The files of some shards, each asked for by name; without those that do not exist."""
    names = [f"{shard}{end}" for shard in shards for end in ("", ".rows", ".json")]
    with ThreadPoolExecutor(_NUM_ASKED) as pool:
        return {info.path: info for info in pool.map(store.info, names) if info is not None}


def _same_place(found: Shard, listed: Shard) -> Shard:
    """Without the object's version where the manifest was written elsewhere: a copy is the same data set."""
    return found if found.etag and listed.etag else replace(found, etag=listed.etag)


def _report(where: str, manifest: Manifest, examiner: "_Examiner") -> ManifestReport:
    return ManifestReport(
        path=where,
        num_shards=len(manifest.shards),
        num_images=manifest.num_images,
        num_raw=sum(shard.num_raw for shard in manifest.shards),
        num_bytes=manifest.num_bytes,
        image_bytes=manifest.image_bytes,
        num_classes=None if manifest.class_names is None else len(manifest.class_names),
        digest=manifest.digest,
        num_rows_written=examiner.num_rows_written,
        num_images_read=examiner.num_images_read,
    )


def _where(store: Store, name: str) -> str:
    return f"{store.shown.rstrip('/')}/{name}"


def _check_faults(where: str, faults: dict[str, str]) -> None:
    if faults:
        named = [f"{name} {fault}" for name, fault in faults.items()]
        raise DataError(
            f"{where}: does not match the files: {_some(named)}; copy them again, or write the manifest again with "
            "`fastssl manifest`"
        )


def _some(names: Sequence[str]) -> str:
    """The first names as one text."""
    more = f" and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else ""
    return ", ".join(printable(name, 100) for name in names[:NUM_NAMED]) + more


def _check_names(store: Store, names: Sequence[str]) -> None:
    """All shards of a numbered series must be there, and of one series only."""
    if not names:
        raise DataError(f"{store.shown}: no .beton files; `fastssl convert` writes them (with --shards, several)")
    if len(names) > MAX_SHARDS:
        raise DataError(f"{store.shown}: {len(names):,} .beton files; a data set has at most {MAX_SHARDS:,}")
    series: dict[str, dict[int, dict[int, str]]] = {}  # by base name, total and number
    for name in names:
        if reason := why_no_name(name):
            raise DataError(f"{_where(store, name)}: cannot be a shard: {reason}; rename it")
        if match := _NUMBERED.fullmatch(name):
            base, number, total = match[1], int(match[2]), int(match[3])
            numbers = series.setdefault(base, {}).setdefault(total, {})
            if number in numbers:
                raise DataError(f"{_where(store, name)}: the same shard as {numbers[number]}; remove one of them")
            if number >= total:
                raise DataError(f"{_where(store, name)}: its number must be less than {total}; rename or remove it")
            numbers[number] = name
    for base, totals in series.items():
        if len(totals) > 1:
            some = [next(iter(numbers.values())) for numbers in totals.values()]
            raise DataError(f"{store.shown}: shards of several conversions: {_some(some)}; remove those of all but one")
        for total, numbers in totals.items():
            _check_series(store, base, total, numbers)


def _check_series(store: Store, base: str, total: int, numbers: dict[int, str]) -> None:
    if (num_missing := total - len(numbers)) > 0:
        missing = islice((k for k in range(total) if k not in numbers), NUM_NAMED)
        names = [f"{base}-{k:05d}-of-{total:05d}.beton" for k in missing]
        more = f" and {num_missing - len(names):,} more" if num_missing > len(names) else ""
        raise DataError(f"{store.shown}: shards are missing: {', '.join(names)}{more}; convert or copy them first")


@dataclass(frozen=True)
class _Sidecar:
    """What is kept of a shard's sidecar; None: unknown."""

    num_images: int | None = None
    file_bytes: int | None = None
    rows_crc32: int | None = None

    def fits(self, num_images: int, file_bytes: int) -> bool:
        """Whether it belongs to a file, as far as these numbers say."""
        return self.num_images in (None, num_images) and self.file_bytes in (None, file_bytes)


@dataclass(frozen=True)
class _Found:
    """A shard that was examined.

    Attributes:
        shard: Its entry in the manifest.
        label_counts: int64, by label, without unlabelled images.
        num_read: Number of images whose bytes were read.
        is_written: Whether its rows were written.
    """

    shard: Shard
    label_counts: np.ndarray
    num_read: int
    is_written: bool


class _Examiner:
    """Examines shards in threads; a context manager. Each is read once at most, in ranges that other threads read."""

    def __init__(
        self,
        store: Store,
        files: dict[str, ObjectInfo],
        *,
        verify: bool,
        num_threads: int | None,
        is_check: bool = False,
    ) -> None:
        self._store, self._files = store, files
        self._verify, self._is_check = verify, is_check
        self._num_threads = num_threads or len(os.sched_getaffinity(0))
        self._error: BaseException | None = None  # the first one
        self._lock = threading.Lock()  # of the progress
        self.num_rows_written = self.num_images_read = 0

    def __enter__(self) -> "_Examiner":
        self._ranges = ThreadPoolExecutor(self._num_threads, thread_name_prefix="fastssl-ranges")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._stop(error)
        self._ranges.shutdown(cancel_futures=True)

    def manifest(self, shards: Sequence[ObjectInfo]) -> Manifest:
        """The manifest of these shards, in this order."""
        class_names, sidecars = self._read_sidecars(shards)
        found: list[Shard] = []
        counts = np.zeros(len(class_names or ()), np.int64)
        by_rows: dict[str, str] = {}
        num_bytes = sum(info.num_bytes for info in shards)
        with Progress(self._store.shown, num_bytes, unit="B") as self._progress:
            pairs = zip(shards, sidecars, strict=True)
            for each in self._in_threads(lambda pair: self._examine(*pair), pairs):
                name = each.shard.name
                if (other := by_rows.setdefault(each.shard.rows_sha256, name)) != name:
                    raise DataError(
                        f"{_where(self._store, name)}: holds the same images as {other}; remove one of them"
                    )
                if len(each.label_counts) > len(counts):
                    counts.resize(len(each.label_counts), refcheck=False)
                counts[: len(each.label_counts)] += each.label_counts
                self.num_rows_written += each.is_written
                self.num_images_read += each.num_read
                found.append(each.shard)
        return Manifest(tuple(found), class_names, counts.tolist())

    def _in_threads(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`map` in threads, in order. After an exception, the other threads stop at their next range."""
        ahead: deque[Future[R]] = deque()
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="fastssl-shards") as pool:
            try:
                for item in items:
                    ahead.append(pool.submit(self._run, function, item))
                    if len(ahead) >= NUM_AHEAD * self._num_threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            except BaseException as error:
                self._stop(error)
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _run(self, function: Callable[[T], R], item: T) -> R:
        try:
            return function(item)
        except BaseException as error:
            self._stop(error)
            raise

    def _stop(self, error: BaseException) -> None:
        """Let all threads end with the first error."""
        self._error = self._error or error

    def _read_sidecars(self, shards: Sequence[ObjectInfo]) -> tuple[list[str] | None, list[_Sidecar]]:
        """The names of the classes, which must agree, and what else is needed of the sidecars."""
        first: list[str] | None = None
        kept: list[_Sidecar] = []
        for info, sidecar in zip(shards, self._in_threads(self._sidecar, shards), strict=True):
            names = sidecar.get("class_names")
            if kept and names != first:
                raise DataError(
                    f"{self._store.shown}: {shards[0].path} and {info.path} have other class names "
                    f"({_difference(first, names)}); convert them together, with --shards"
                )
            first = names
            numbers = [sidecar.get(key) for key in ("num_images", "file_bytes", "rows_crc32")]
            kept.append(_Sidecar(*(number if type(number) is int else None for number in numbers)))
        return first, kept

    def _sidecar(self, info: ObjectInfo) -> dict[str, Any]:
        name = f"{info.path}.json"
        if name not in self._files:
            return {}
        return parse_sidecar(self._store.get_whole(name, MAX_SIDECAR_BYTES)[0], _where(self._store, name))

    def _examine(self, info: ObjectInfo, sidecar: _Sidecar) -> _Found:
        where, rows_name = _where(self._store, info.path), f"{info.path}.rows"
        tables = BetonTables(where, info.num_bytes, lambda *place: self._read(info, *place))
        if not sidecar.fits(tables.num_samples, info.num_bytes):
            raise DataError(f"{where}.json: belongs to another file; delete it or convert again")
        rows = _rows_of(tables, info.num_bytes)
        label_counts = np.bincount(tables.labels[tables.labels >= 0])
        del tables
        stored = self._stored_rows(rows_name, rows, sidecar)
        if stored is None and self._is_check:
            raise DataError(f"{where}.rows: missing, or of another file; `fastssl manifest` writes it")
        num_read, content = 0, stored
        if content is None or self._verify:
            crcs, num_read = self._read_images(info, rows), len(rows)
            if stored is not None:
                _compare(where, crcs, np.frombuffer(stored, ROW)["crc32"])
            rows["crc32"] = crcs
            content = rows.tobytes()
            if sidecar.rows_crc32 not in (None, zlib.crc32(content)):
                raise DataError(f"{where}: its images changed since the conversion; copy it again or convert again")
        else:
            self._advance(info.num_bytes)
        if stored is None:
            self._store.put(rows_name, content)
        return _Found(_shard_of(info, rows, content), label_counts, num_read, stored is None)

    def _stored_rows(self, name: str, rows: np.ndarray, sidecar: _Sidecar) -> bytes | None:
        """Content of a rows file; None: there is none, or it is of another .beton."""
        if name not in self._files or self._files[name].num_bytes != rows.nbytes:
            return None
        stored = self._store.get_whole(name, rows.nbytes)[0]
        if sidecar.rows_crc32 not in (None, zlib.crc32(stored)):
            return None
        heads, own_heads = (
            np.frombuffer(each, np.uint8).reshape(-1, ROW.itemsize)[:, :HEAD_BYTES] for each in (stored, rows)
        )
        return stored if np.array_equal(heads, own_heads) else None

    def _read(self, info: ObjectInfo, dtype: np.dtype, start: int, num: int) -> np.ndarray:
        """Records of a file, for `BetonTables`."""
        stop = start + num * dtype.itemsize
        if stop > info.num_bytes:
            raise truncated(_where(self._store, info.path))
        parts = [
            self._store.get(info.path, first, min(first + RANGE_BYTES, stop), info.etag)
            for first in range(start, stop, RANGE_BYTES)
        ]
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype)

    def _read_images(self, info: ObjectInfo, rows: np.ndarray) -> np.ndarray:
        """uint32 [N], `row_crc32` of each image."""
        crcs = np.empty(len(rows), np.uint32)
        heads = memoryview(rows.tobytes())
        ahead: deque[Future[None]] = deque()
        num_done = 0

        def read(some: np.ndarray) -> None:
            nonlocal num_done
            if self._error is not None:
                raise self._error
            start = int(rows["ptr"][some[0]])
            stop = int(rows["ptr"][some[-1]]) + int(num_bytes_of(rows[some[-1]]))
            self._checksum(info, rows, heads, some, crcs)
            self._advance(stop - start)
            with self._lock:
                num_done += stop - start

        for some in _ranges(rows):
            ahead.append(self._ranges.submit(read, some))
            if len(ahead) >= NUM_AHEAD * self._num_threads:
                ahead.popleft().result()
        while ahead:
            ahead.popleft().result()
        self._advance(info.num_bytes - num_done)  # tables, and the gaps between images
        return crcs

    def _checksum(
        self, info: ObjectInfo, rows: np.ndarray, heads: memoryview, some: np.ndarray, crcs: np.ndarray
    ) -> None:
        """Read the images with these indices, which lie in one range, and put their checksums into `crcs`."""
        ptrs, sizes = rows["ptr"][some].tolist(), num_bytes_of(rows[some]).tolist()
        first, stop = ptrs[0], ptrs[-1] + sizes[-1]
        crc, data, start = 0, memoryview(b""), first
        for i, ptr, num_bytes in zip(some.tolist(), ptrs, sizes, strict=True):
            crc, at, end = 0, ptr, ptr + num_bytes
            while at < end:  # once, but for images of more than RANGE_BYTES
                if at >= start + len(data):
                    start = at
                    content = self._store.get(info.path, at, min(at + RANGE_BYTES, stop), info.etag)
                    data = memoryview(content)
                part = data[at - start : end - start]
                crc = zlib.crc32(part, crc)
                at += len(part)
            head = i * ROW.itemsize
            crcs[i] = zlib.crc32(heads[head : head + HEAD_BYTES], crc)

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._progress.advance(num_bytes)


def _rows_of(tables: BetonTables, num_file_bytes: int) -> np.ndarray:
    """Rows of a file, without checksums.

    Raises:
        DataError: no rows can describe it.
    """
    large = np.flatnonzero(tables.data_bytes > MAX_IMAGE_BYTES)
    if len(large):
        raise DataError(
            f"{tables.path}: image {large[0]} takes {int(tables.data_bytes[large[0]]):,} bytes, and those of a shard "
            f"at most {MAX_IMAGE_BYTES:,}; convert it again with --max-px"
        )
    rows = build_rows(
        ptr=tables.data_ptr,
        num_bytes=tables.data_bytes,
        modes=tables.modes,
        sizes=tables.sizes,
        labels=tables.labels,
    )
    if first_bad_row(rows, num_file_bytes, MAX_LABEL) is not None:
        raise truncated(tables.path)
    order = np.argsort(rows["ptr"], kind="stable")
    ends = rows["ptr"][order].astype(np.int64) + num_bytes_of(rows[order])
    if (rows["ptr"][order][1:].astype(np.int64) < ends[:-1]).any():
        raise truncated(tables.path)  # two images in one place
    return rows


def _ranges(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of images that lie within `RANGE_BYTES`, in the order of the file; a larger image is alone."""
    order = np.argsort(rows["ptr"], kind="stable")
    starts = rows["ptr"][order].astype(np.int64)
    ends = starts + num_bytes_of(rows[order])
    first = 0
    while first < len(order):
        stop = max(first + 1, int(np.searchsorted(ends, starts[first] + RANGE_BYTES, side="right")))
        yield order[first:stop]
        first = stop


def _shard_of(info: ObjectInfo, rows: np.ndarray, content: bytes) -> Shard:
    heights, widths = rows["height"], rows["width"]
    is_one_size = (heights == heights[0]).all() and (widths == widths[0]).all()
    return Shard(
        name=info.path,
        num_images=len(rows),
        num_bytes=info.num_bytes,
        image_bytes=int(num_bytes_of(rows).sum()),
        num_raw=int(modes_of(rows).sum()),
        rows_sha256=hashlib.sha256(content).hexdigest(),
        etag=info.etag,
        one_size_px=(int(heights[0]), int(widths[0])) if is_one_size else None,
    )


def _compare(where: str, found: np.ndarray, expected: np.ndarray) -> None:
    bad = np.flatnonzero(found != expected).tolist()
    if bad:
        raise DataError(
            f"{where}: {len(bad):,} of {len(found):,} images do not match their checksums in the rows file: "
            f"{_some([str(i) for i in bad])}; copy it again or convert again"
        )


def _difference(first: list[str] | None, second: list[str] | None) -> str:
    """How two lists of class names differ."""
    if first is None or second is None:
        return f"the {'first' if first is None else 'second'} has no names: no sidecar, or one without classes"
    if len(first) != len(second):
        return f"{len(first):,} and {len(second):,} classes"
    k = next(k for k, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return f"class {k} is {printable(first[k], 50)!r} and {printable(second[k], 50)!r}"
