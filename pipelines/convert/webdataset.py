"""WebDataset: tar archives in which adjacent members with the same name form a sample. No files are extracted."""

import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from multiprocessing import get_context
from typing import IO

from pipelines.beton.format import MAX_PAGE_BYTES
from pipelines.convert.source import EXTENSIONS, Item, Source, checked_label, fingerprint
from pipelines.errors import DataError

LABEL_PARTS = ("cls", "json")
MAX_LABEL_BYTES = 1 << 20
MIN_POOL_BYTES = 1 << 30  # starting a process takes a second, the time to count a gigabyte of archives


def webdataset_source(archives: list[str]) -> Source:
    """Samples of tar archives, plain or compressed (gz, bz2, xz), in the archives' order.

    A sample is a sequence of adjacent members with the same key: the path up to the first dot of the file name. Its
    image is the first member with an image extension. Its label is the integer in `.cls`, or `label` in `.json`, else
    none. Samples are counted first, from the headers alone (which requires decompressing a compressed archive), several
    archives at once.

    Raises:
        DataError: an archive is truncated or not a tar file, or no sample contains an image.
    """
    counts = _count_all(archives)
    num_images, num_ignored = (sum(numbers) for numbers in zip(*counts, strict=True))
    if not num_images:
        raise DataError(f"{archives[0]}: no images in it, nor in the other {len(archives) - 1} archives")

    def read(start: int, stop: int) -> Iterator[Item]:
        first = 0
        for archive, (num, _) in zip(archives, counts, strict=True):
            if first < stop and start < first + num:
                yield from read_archive(archive, max(start - first, 0), min(stop - first, num))
            first += num

    return Source(
        name=os.path.abspath(archives[0]) + (f" and {len(archives) - 1} more" if len(archives) > 1 else ""),
        num_items=num_images,
        read=read,
        fingerprint=fingerprint(archives),
        num_ignored=num_ignored,
    )


def count_archive(archive: str) -> tuple[int, int]:
    """Count the samples with an image and those without."""
    num_with, num_without = 0, 0
    for _, members in groupby(_members(archive), key=lambda found: found[0]):
        if any(_is_image(part) for _, part, _, _ in members):
            num_with += 1
        else:
            num_without += 1
    return num_with, num_without


def read_archive(archive: str, start: int, stop: int) -> Iterator[Item]:
    """Yield samples start..stop-1 among those with an image; for the others, only the headers are read."""
    number = 0
    for key, members in groupby(_members(archive), key=lambda found: found[0]):
        if number >= stop:
            return
        image, label, where = None, None, f"{archive}/{key}"
        has_image = False
        for _, part, member, tar in members:
            if _is_image(part) and not has_image:
                has_image = True
                if number >= start:
                    image = _read(tar, member, MAX_PAGE_BYTES, where)
            elif part in LABEL_PARTS and number >= start and label is None:
                label = _label(part, _read(tar, member, MAX_LABEL_BYTES, where), where)
        number += has_image
        if image is not None:
            yield Item(where, image, checked_label(label, where))


class _StrictTarInfo(tarfile.TarInfo):
    """Raises an error at a damaged header, which tarfile treats as the end of the archive, silently losing images."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # pyright: ignore
            raise tarfile.ReadError(str(error)) from error


def _members(archive: str) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Yield (key, part, member, archive) of the regular files; a member must be read before the next is requested."""
    try:
        with _open(archive) as tar:
            for member in tar:
                tar.members = []  # else every header stays in memory  # pyright: ignore
                folder, name = os.path.split(member.name)
                stem, dot, part = name.partition(".")
                if member.isreg() and not member.issparse() and stem and dot:
                    yield os.path.join(folder, stem), part.lower(), member, tar
    except FileNotFoundError as error:
        raise DataError(f"{archive}: no such file") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive}: not a whole tar archive ({error}); copy it again") from error


def _open(archive: str) -> tarfile.TarFile:
    """Open an archive: plain ones with seeking, so that skipped members are not read; compressed ones as a stream."""
    try:
        return tarfile.open(archive, "r:", tarinfo=_StrictTarInfo)
    except tarfile.ReadError:
        return tarfile.open(archive, "r|*", tarinfo=_StrictTarInfo)


def _is_image(part: str) -> bool:
    return f".{part}" in EXTENSIONS


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int, where: str) -> bytes:
    if member.size > max_bytes:
        raise DataError(f"{where}: a member of {member.size:,} bytes; at most {max_bytes:,} are read")
    file: IO[bytes] | None = tar.extractfile(member)  # a file object for reading; nothing is written to disk
    assert file is not None
    return file.read()


def _label(part: str, data: bytes, where: str) -> object:
    try:
        if part == "cls":
            return int(data)
        found = json.loads(data)
        return found.get("label") if isinstance(found, dict) else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}.{part}: not a label ({data[:40]!r})") from error


def _count_all(archives: list[str]) -> list[tuple[int, int]]:
    num_processes = min(len(archives), len(os.sched_getaffinity(0)))
    num_bytes = sum(os.path.getsize(archive) for archive in archives)
    if num_processes == 1 or num_bytes < MIN_POOL_BYTES:
        return [count_archive(archive) for archive in archives]
    with ProcessPoolExecutor(num_processes, get_context("forkserver")) as pool:
        return list(pool.map(count_archive, archives))
