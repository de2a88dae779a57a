"""Verifies a whole .beton file or a data set of many: checksums, and every image with the engines' decoder."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.beton import RAW, BetonReader
from pipelines.beton.bus_error import report_bus_errors
from pipelines.convert import bounded_map
from pipelines.convert.images import CorruptImageError, decode_as_engines_do
from pipelines.errors import DataError
from pipelines.printable import printable
from pipelines.progress import Progress
from pipelines.remote.store import is_url
from pipelines.shards.build import check_manifest
from pipelines.shards.open_images import names_dataset, open_images
from pipelines.shards.pieces import WRONG_CHECKSUM, Piece
from pipelines.shards.rows import HEAD_BYTES, ROW, build_rows, row_crc32, rows_path
from pipelines.shards.sharded_images import ShardedImages, to_samples
from pipelines.shards.store import opened_store

NUM_SAMPLES_PER_TASK = 64
NUM_TASKS_AHEAD = 4
_REMOTE_THREADS = 16  # which wait for requests most of the time
NUM_NAMED = 5  # number of bad images listed in the error message


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Report on a file that passed verification.

    Attributes:
        path: The file.
        num_images: Number of images; all can be decoded, at their recorded sizes.
        num_jpeg: Number of images stored as JPEG.
        num_raw: Number of images stored as pixels.
        file_bytes: Size of the file.
        digest: Checksum of its rows, which hold one of each image, equal to the sidecar's; for files of older versions,
            of the file. None if there is no sidecar to compare with.
    """

    path: Path
    num_images: int
    num_jpeg: int
    num_raw: int
    file_bytes: int
    digest: str | None

    def __str__(self) -> str:
        checksum = f"checksum {self.digest} as in the sidecar" if self.digest else "no sidecar, so no checksum compared"
        return (
            f"{printable(self.path)}: whole; {self.num_images:,} images "
            f"({self.num_jpeg:,} JPEG, {self.num_raw:,} raw), {self.file_bytes:,} bytes, {checksum}"
        )


def verify(path: str | Path, *, num_threads: int | None = None) -> VerifyReport:
    """Check the structure, the checksums, and that every image can be decoded at its recorded size.

    Raw pixels are not decoded: their number of bytes is checked, and the checksums cover them.

    Args:
        path: The .beton file.
        num_threads: Number of threads; None: one per core.
    Raises:
        DataError: the structure is damaged, images are not as they were written or cannot be decoded (the message lists
            the first ones), or the tables are not those that were written.
    """
    reader = BetonReader(path)
    report_bus_errors(reader)
    num_threads = num_threads or len(os.sched_getaffinity(0))
    key = next((key for key in ("rows_sha256", "sha256") if key in reader.sidecar), None)
    with ThreadPoolExecutor(1) as hashing:
        of_file = hashing.submit(_sha256, reader.path) if key == "sha256" else None
        found = _FileCheck(reader, has_checksums=key == "rows_sha256")
        bad = _bad_images(found, num_threads)
        digest = of_file.result() if of_file else found.digest
    same = key is None or digest == reader.sidecar[key]
    if bad or not same:
        raise DataError(f"{path}: {_describe(bad, reader.num_samples, same=same)}; copy it again or convert again")
    num_raw = int((reader.modes == RAW).sum())
    return VerifyReport(
        path=reader.path,
        num_images=reader.num_samples,
        num_jpeg=reader.num_samples - num_raw,
        num_raw=num_raw,
        file_bytes=len(reader.mmap),
        digest=digest,
    )


@dataclass(frozen=True, kw_only=True)
class ShardsVerifyReport:
    """Report on a data set of many files that passed verification.

    Attributes:
        path: Its folder, pattern or URL.
        num_shards: Number of .beton files, which are those of the manifest.
        num_images: Number of images; all match their checksums and can be decoded, at their recorded sizes.
        num_jpeg: Number of images stored as JPEG.
        num_raw: Number of images stored as pixels.
        file_bytes: Size of all files.
        digest: See `pipelines.shards.manifest.Manifest.digest`.
    """

    path: str
    num_shards: int
    num_images: int
    num_jpeg: int
    num_raw: int
    file_bytes: int
    digest: str

    def __str__(self) -> str:
        return (
            f"{printable(self.path)}: whole; {self.num_shards:,} shards, {self.num_images:,} images "
            f"({self.num_jpeg:,} JPEG, {self.num_raw:,} raw), {self.file_bytes:,} bytes, digest {self.digest}"
        )


def verify_any(place: str, *, num_threads: int | None = None) -> VerifyReport | ShardsVerifyReport:
    """`verify` a .beton file, or `verify_shards` of what else `open_images` takes."""
    if names_dataset(place) or Path(place).is_dir():
        return verify_shards(place, num_threads=num_threads)
    return verify(place, num_threads=num_threads)


def verify_shards(place: str, *, num_threads: int | None = None) -> ShardsVerifyReport:
    """Check that the files are those of the manifest, every image's checksum, and that every image can be decoded.

    Args:
        place: See `open_images`; a pattern has no manifest to compare with, but rows.
        num_threads: Number of threads; None: one per core, for a URL 16.
    Raises:
        DataError: a file is missing or another one, or images are damaged (the message lists the first ones).
    """
    num_threads = num_threads or (_REMOTE_THREADS if is_url(place) else len(os.sched_getaffinity(0)))
    images = open_images(place)
    assert isinstance(images, ShardedImages)
    if not glob.has_magic(place) or Path(place).exists():
        with opened_store(place) as store:
            check_manifest(store, num_threads=num_threads)
    bad = _bad_in_shards(images, num_threads)
    images.files.close()
    manifest = images.manifest
    if bad:
        raise DataError(
            f"{images.path}: {_describe(bad, images.num_samples, same=True)}; copy these shards again or convert again"
        )
    num_raw = sum(shard.num_raw for shard in manifest.shards)
    return ShardsVerifyReport(
        path=str(images.path),
        num_shards=len(manifest.shards),
        num_images=images.num_samples,
        num_jpeg=images.num_samples - num_raw,
        num_raw=num_raw,
        file_bytes=manifest.num_bytes,
        digest=manifest.digest,
    )


def _bad_in_shards(images: ShardedImages, num_threads: int) -> list[tuple[str, str]]:
    """(shard and number in it, reason) of every image that is not as it was written, in order."""
    shards, num_block = images.manifest.shards, images.block_samples

    def blocks() -> Iterator[tuple[int, int, int]]:
        for shard, about in enumerate(shards):
            for first in range(0, about.num_images, num_block):
                yield shard, first, min(first + num_block, about.num_images)

    def check(block: tuple[int, int, int]) -> tuple[int, list[tuple[str, str]]]:
        shard, first, stop = block
        faults = _faults(images.files.read(shard, first, stop))
        images.check_unchanged()
        return stop - first, [(f"{shards[shard].name} {first + k}", fault) for k, fault in faults]

    bad: list[tuple[str, str]] = []
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-verify")
    with Progress(str(images.path), images.num_samples) as progress:
        for num, found in bounded_map(check, blocks(), pool, max_ahead=2 * num_threads):
            bad += found
            progress.advance(num)
    return bad


def _faults(piece: Piece) -> Iterator[tuple[int, str]]:
    """(position, reason) of damaged images."""
    rows = piece.rows
    samples = to_samples(np.arange(len(rows)), rows, piece.addresses, piece.owners)
    heads = rows.view(np.uint8).reshape(len(rows), -1)[:, :HEAD_BYTES]
    for k in range(len(rows)):
        stored = samples.image_bytes(k)
        if k in piece.damaged or row_crc32(heads[k].tobytes(), stored.data) != rows["crc32"][k]:
            yield k, WRONG_CHECKSUM
        elif samples.modes[k] != RAW and (fault := _fault_of_jpeg(stored, samples.sizes[k])):
            yield k, fault


def _fault_of_jpeg(stored: np.ndarray, size: np.ndarray) -> str:
    """Why the engines would reject a JPEG of this height and width; empty: they would not."""
    try:
        decode_as_engines_do(stored, *size.tolist())
    except CorruptImageError as error:
        return str(error)
    return ""


def _describe(bad: Sequence[tuple[int | str, str]], num_samples: int, *, same: bool) -> str:
    faults = []
    if bad:
        named = ", ".join(f"{i} ({reason})" for i, reason in bad[:NUM_NAMED])
        more = f" and {len(bad) - NUM_NAMED:,} more" if len(bad) > NUM_NAMED else ""
        faults.append(f"{len(bad):,} of {num_samples:,} images are bad: {named}{more}")
    if not same:
        faults.append("its checksum is not the sidecar's")
    return "; ".join(faults)


class _FileCheck:
    """Compares a file with its checksums: builds its rows again, from its tables and its images.

    Attributes:
        reader: The file.
    """

    def __init__(self, reader: BetonReader, *, has_checksums: bool) -> None:
        """Build the rows without their checksums; `fault` computes these.

        Args:
            reader: The file.
            has_checksums: Whether the sidecar has a checksum of its rows.
        """
        self.reader = reader
        self._rows = self._written = None
        if has_checksums:
            self._rows = build_rows(
                ptr=reader.data_ptr,
                num_bytes=reader.data_bytes,
                modes=reader.modes,
                sizes=reader.sizes,
                labels=reader.labels,
            )
            path = rows_path(reader.path)
            written = path.read_bytes() if path.is_file() else b""
            is_of_file = len(written) == self._rows.nbytes
            if is_of_file and hashlib.sha256(written).hexdigest() == reader.sidecar["rows_sha256"]:
                self._written = np.frombuffer(written, ROW)

    @property
    def digest(self) -> str | None:
        """Checksum of the rows, in hex; None: they are not compared."""
        return None if self._rows is None else hashlib.sha256(self._rows.tobytes()).hexdigest()

    def fault(self, i: int) -> str:
        """Why an image is bad: it is not the one that was written, or the engines would reject it; empty: it is not."""
        stored = self.reader.image_bytes(i)
        if self._rows is not None:
            self._rows["crc32"][i] = row_crc32(self._rows[i].tobytes()[:HEAD_BYTES], stored.data)
            if self._written is not None and self._rows[i] != self._written[i]:
                return WRONG_CHECKSUM
        return _fault_of_jpeg(stored, self.reader.sizes[i]) if self.reader.modes[i] != RAW else ""


def _bad_images(file: _FileCheck, num_threads: int) -> list[tuple[int, str]]:
    """(index, reason) of every image that is bad, in order."""
    reader = file.reader

    def ranges() -> Iterator[range]:
        for first in range(0, reader.num_samples, NUM_SAMPLES_PER_TASK):
            yield range(first, min(first + NUM_SAMPLES_PER_TASK, reader.num_samples))

    def check(samples: range) -> tuple[int, list[tuple[int, str]]]:
        found = [(i, file.fault(i)) for i in samples]
        return len(samples), [(i, fault) for i, fault in found if fault]

    bad: list[tuple[int, str]] = []
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-verify")
    with Progress(reader.path.name, reader.num_samples) as progress:
        for num, found in bounded_map(check, ranges(), pool, max_ahead=num_threads * NUM_TASKS_AHEAD):
            bad += found
            progress.advance(num)
    return bad


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
