"""Verifies a whole .beton file: its checksum, and every image with the engines' decoder."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipelines.beton import RAW, BetonReader
from pipelines.beton.bus_error import report_bus_errors
from pipelines.convert import bounded_map
from pipelines.convert.images import CorruptImageError, decode_as_engines_do
from pipelines.errors import DataError
from pipelines.printable import printable
from pipelines.progress import Progress

NUM_SAMPLES_PER_TASK = 64
NUM_TASKS_AHEAD = 4
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
        sha256: Checksum of the file, equal to the sidecar's; None if there is no sidecar to compare with.
    """

    path: Path
    num_images: int
    num_jpeg: int
    num_raw: int
    file_bytes: int
    sha256: str | None

    def __str__(self) -> str:
        checksum = f"sha256 {self.sha256} as in the sidecar" if self.sha256 else "no sidecar, so no checksum compared"
        return (
            f"{printable(self.path)}: whole; {self.num_images:,} images "
            f"({self.num_jpeg:,} JPEG, {self.num_raw:,} raw), {self.file_bytes:,} bytes, {checksum}"
        )


def verify(path: str | Path, *, num_threads: int | None = None) -> VerifyReport:
    """Check the structure, the checksum, and that every image can be decoded at its recorded size.

    Raw pixels are not decoded: their number of bytes is checked, and the checksum covers them.

    Args:
        path: The .beton file.
        num_threads: Number of threads; None: one per core.
    Raises:
        DataError: the structure is damaged, images cannot be decoded (the message lists the first ones), or the
            checksum differs from the sidecar's.
    """
    reader = BetonReader(path)
    report_bus_errors(reader)
    num_threads = num_threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(1) as hashing:
        digest = hashing.submit(_sha256, reader.path) if "sha256" in reader.sidecar else None
        bad = _bad_images(reader, num_threads)
        sha256 = digest.result() if digest else None
    same = sha256 == reader.sidecar.get("sha256")
    if bad or not same:
        raise DataError(f"{path}: {_describe(bad, reader.num_samples, same=same)}; copy it again or convert again")
    num_raw = int((reader.modes == RAW).sum())
    return VerifyReport(
        path=reader.path,
        num_images=reader.num_samples,
        num_jpeg=reader.num_samples - num_raw,
        num_raw=num_raw,
        file_bytes=len(reader.mmap),
        sha256=sha256,
    )


def _describe(bad: list[tuple[int, str]], num_samples: int, *, same: bool) -> str:
    faults = []
    if bad:
        named = ", ".join(f"{i} ({reason})" for i, reason in bad[:NUM_NAMED])
        more = f" and {len(bad) - NUM_NAMED:,} more" if len(bad) > NUM_NAMED else ""
        faults.append(f"{len(bad):,} of {num_samples:,} images are bad: {named}{more}")
    if not same:
        faults.append("its sha256 is not the sidecar's")
    return "; ".join(faults)


def _bad_images(reader: BetonReader, num_threads: int) -> list[tuple[int, str]]:
    """(index, reason) of every image that cannot be decoded, in order."""

    def ranges() -> Iterator[range]:
        for first in range(0, reader.num_samples, NUM_SAMPLES_PER_TASK):
            yield range(first, min(first + NUM_SAMPLES_PER_TASK, reader.num_samples))

    def check(samples: range) -> tuple[int, list[tuple[int, str]]]:
        found = [(i, _fault(reader, i)) for i in samples if reader.modes[i] != RAW]
        return len(samples), [(i, fault) for i, fault in found if fault]

    bad: list[tuple[int, str]] = []
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-verify")
    with Progress(reader.path.name, reader.num_samples) as progress:
        for num, found in bounded_map(check, ranges(), pool, max_ahead=num_threads * NUM_TASKS_AHEAD):
            bad += found
            progress.advance(num)
    return bad


def _fault(reader: BetonReader, i: int) -> str:
    """Why the engines would reject a JPEG; empty if they would not."""
    try:
        decode_as_engines_do(reader.image_bytes(i), *map(int, reader.sizes[i]))
    except CorruptImageError as error:
        return str(error)
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
