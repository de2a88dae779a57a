"""WebDataset: tar archives whose neighbouring members of one name make a sample. Nothing is ever extracted."""

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
MIN_POOL_BYTES = 1 << 30  # to start a process takes a second, in which a gigabyte of archives is counted


def webdataset_source(archives: list[str]) -> Source:
    """Samples of tar archives, plain or compressed (gz, bz2, xz), in the archives' order.

    A sample is a run of members of one key, the path up to the first dot of its last part. Its image is the first
    part with an image's extension; its label the integer of `.cls`, or `label` in `.json`, else none. They are
    counted first, from the headers alone (a compressed archive is decompressed for that), several archives at once.

    Raises:
        DataError: an archive is truncated, no tar, or no sample holds an image.
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
    """Samples with an image, and samples without one."""
    num_with, num_without = 0, 0
    for _, members in groupby(_members(archive), key=lambda found: found[0]):
        if any(_is_image(part) for _, part, _, _ in members):
            num_with += 1
        else:
            num_without += 1
    return num_with, num_without


def read_archive(archive: str, start: int, stop: int) -> Iterator[Item]:
    """Samples start..stop-1 of those that have an image; the others are passed over by their headers."""
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
    """tarfile takes a damaged header for the end of the archive: half the images would be missing without a word."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # pyright: ignore
            raise tarfile.ReadError(str(error)) from error


def _members(archive: str) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """(key, part, member, archive) of the regular files; a member must be read before the next is asked for."""
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
    """Plain archives are read with seeks, so that what is not wanted costs nothing; others as a stream."""
    try:
        return tarfile.open(archive, "r:", tarinfo=_StrictTarInfo)
    except tarfile.ReadError:
        return tarfile.open(archive, "r|*", tarinfo=_StrictTarInfo)


def _is_image(part: str) -> bool:
    return f".{part}" in EXTENSIONS


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int, where: str) -> bytes:
    if member.size > max_bytes:
        raise DataError(f"{where}: a member of {member.size:,} bytes; at most {max_bytes:,} are read")
    file: IO[bytes] | None = tar.extractfile(member)  # a reader; nothing is written
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
