"""WebDataset: tar archives in which adjacent members with the same name form a sample. No files are extracted."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import groupby
from multiprocessing import get_context
from typing import IO, Self, TypeVar

import numpy as np

from pipelines.convert.content import has_image_extension
from pipelines.convert.remote_source import NUM_THREADS, SourcePath, name_of, open_source, size_of
from pipelines.convert.source import Item, Source, checked_label, fingerprint
from pipelines.errors import DataError, one_line
from pipelines.files import MAX_FILE_BYTES, check_inflation

LABEL_PARTS = ("cls", "json")
MAX_LABEL_BYTES = 1 << 20
# Of a name or of other additional headers of a member. tarfile holds these in memory; before Python 3.11.10 it searches
# them in time that grows with the square of their size.
MAX_NAME_BYTES = 1 << 14
MAX_GLOBAL_HEADERS = 1000  # tarfile keeps them all, and gives each member a copy
MAX_BYTES_AFTER_END = 64 << 20  # padding after the end of an archive: GNU tar's default is 10 kB
HEADER_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
READERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open, b"]\0": lzma.open}
MAX_OPEN_ARCHIVES = 64  # that are read in random order
MIN_POOL_BYTES = 1 << 30  # starting a process takes a second, the time to count a gigabyte of archives

T = TypeVar("T")
Member = tuple[str, str, tarfile.TarInfo, tarfile.TarFile]  # key, part, member, archive


def webdataset_source(archives: list[SourcePath]) -> Source:
    """Samples of tar archives, plain or compressed (gz, bz2, xz), in the archives' order.

    A sample is a sequence of adjacent members with the same key: the path up to the first dot of the file name. Its
    image is the first member with an image extension. Its label is the integer in `.cls`, or `label` in `.json`, else
    none. Samples are counted first, from the headers alone (which requires decompressing a compressed archive), several
    archives at once.

    Raises:
        DataError: an archive is truncated or not a tar file, or no sample contains an image.
    """
    counts = _map_archives(count_archive, archives)
    num_images, num_ignored = (sum(numbers) for numbers in zip(*counts, strict=True))
    if not num_images:
        raise DataError(f"{archives[0]}: no images in it, nor in the other {len(archives) - 1} archives")

    def read(start: int, stop: int) -> Iterator[Item]:
        first = 0
        for archive, (num, _) in zip(archives, counts, strict=True):
            if first < stop and start < first + num:
                yield from read_archive(archive, max(start - first, 0), min(stop - first, num))
            first += num

    def pick(numbers: Iterator[int]) -> Iterator[Item]:
        indexes = _map_archives(index_archive, archives)
        for archive, index, (num, _) in zip(archives, indexes, counts, strict=True):
            if len(index) != num:
                raise DataError(f"{archive}: changed while it was read; convert again")
        return _pick(archives, indexes, numbers)

    return Source(
        name=name_of(archives[0]) + (f" and {len(archives) - 1} more" if len(archives) > 1 else ""),
        num_items=num_images,
        read=read,
        pick=pick,
        fingerprint=fingerprint(archives),
        num_left_out=+Counter({"samples without an image": num_ignored}),
    )


def count_archive(archive: SourcePath) -> tuple[int, int]:
    """Count the samples with an image and those without."""
    num_with, num_without = 0, 0
    with _one_line(archive):
        for _, members in groupby(_members(archive), key=lambda found: found[0]):
            if any(_is_image(part) for _, part, _, _ in members):
                num_with += 1
            else:
                num_without += 1
    return num_with, num_without


def read_archive(archive: SourcePath, start: int, stop: int) -> Iterator[Item]:
    """Yield samples start..stop-1 among those with an image; for the others, only the headers are read."""
    number = 0
    with _one_line(archive):
        for key, members in groupby(_members(archive), key=lambda found: found[0]):
            if number >= stop:
                return
            if number < start:
                number += any(_is_image(part) for _, part, _, _ in members)
            elif (item := _read_sample(members, f"{archive}/{key}")) is not None:
                number += 1
                yield item


def _read_sample(members: Iterator[Member], where: str) -> Item | None:
    """The item of a sample; None: it has no image."""
    image, label = None, None
    for _, part, member, tar in members:
        if _is_image(part) and image is None:
            image = _read(tar, member, MAX_FILE_BYTES, where)
        elif part in LABEL_PARTS and label is None:
            label = _label(part, _read(tar, member, MAX_LABEL_BYTES, where), where)
    return None if image is None else Item(where, image, checked_label(label, where))


def index_archive(archive: SourcePath) -> np.ndarray:
    """Find the samples with an image: offset of the first header of each, int64 [N].

    Raises:
        DataError: the archive is compressed, or damaged.
    """
    offsets: list[int] = []
    with _one_line(archive):
        with open_source(archive, is_sparse=True) as file:
            if _reader_of(file) is not None:
                raise DataError(
                    f"{archive}: a compressed archive cannot be read in random order: decompress it to a plain .tar, "
                    "or leave --shuffle out"
                )
        for _, members in groupby(_members(archive), key=lambda found: found[0]):
            first, has_image = None, False
            for _, part, member, _ in members:
                first = member.offset if first is None else first
                has_image = has_image or _is_image(part)
            if has_image and first is not None:
                offsets.append(first)
    return np.array(offsets, np.int64)


def _pick(archives: list[SourcePath], indexes: list[np.ndarray], numbers: Iterator[int]) -> Iterator[Item]:
    """Yield samples by number; the archives used last stay open."""
    stops = np.cumsum([len(index) for index in indexes])
    opened: OrderedDict[int, tuple[tarfile.TarFile, ExitStack]] = OrderedDict()
    try:
        for number in numbers:
            k = int(np.searchsorted(stops, number, side="right"))
            offset = int(indexes[k][number - int(stops[k])])  # counted from the end
            with _one_line(archives[k]):
                if k not in opened:
                    if len(opened) == MAX_OPEN_ARCHIVES:
                        opened.popitem(last=False)[1][1].close()
                    stack = ExitStack()
                    opened[k] = stack.enter_context(_open(archives[k], is_sparse=True)), stack
                opened.move_to_end(k)
                tar, _ = opened[k]
                key, members = next(groupby(_members_from(tar, offset), key=lambda found: found[0]))
                item = _read_sample(members, f"{archives[k]}/{key}")
                if item is None:
                    raise tarfile.ReadError("changed while it was read")
            yield item
    finally:
        for _, stack in opened.values():
            stack.close()


def _members_from(tar: tarfile.TarFile, offset: int) -> Iterator[Member]:
    """The members from an offset on: an archive begins where its file is."""
    assert tar.fileobj is not None
    tar.fileobj.seek(offset)
    rest = tarfile.TarFile(fileobj=tar.fileobj, tarinfo=_StrictTarInfo)
    return _parts(rest, iter(rest.next, None))


@contextmanager
def _one_line(archive: SourcePath) -> Iterator[None]:
    """Name the archive in the error."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{archive}: no such file") from error
    except DataError:
        raise
    except Exception as error:  # tarfile and the decompressors raise many types for damaged archives
        raise DataError(f"{archive}: not a whole tar archive ({one_line(error)}); copy it again") from error


class _StrictTarInfo(tarfile.TarInfo):
    """Raises an error at a damaged header, which tarfile treats as the end of the archive, silently losing images.

    Members with holes (`tar --sparse`) are refused as well: tarfile holds the lists of their pieces in memory, however
    long they are.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in HEADER_TYPES and info.size > MAX_NAME_BYTES):
            raise tarfile.ReadError(f"a header of {info.size:,} bytes; at most {MAX_NAME_BYTES:,} are read")
        return info

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:  # pyright: ignore
            raise tarfile.ReadError(str(error)) from error

    def _refuse_sparse(self, *_: object) -> "tarfile.TarInfo":
        raise tarfile.ReadError("a sparse member; pack the images without --sparse")

    # What tarfile calls for GNU's own type, and for the three generations of pax headers.
    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _members(archive: SourcePath) -> Iterator[Member]:
    """Yield (key, part, member, archive) of the regular files; a member must be read before the next is requested."""
    with _open(archive) as tar:
        yield from _parts(tar, iter(tar))


def _parts(tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo]) -> Iterator[Member]:
    last_bytes = -1
    for member in members:
        tar.members = []  # else every header stays in memory  # pyright: ignore
        if member.offset_data <= last_bytes:
            raise tarfile.ReadError("a member of negative size")
        if len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
            raise tarfile.ReadError(f"more than {MAX_GLOBAL_HEADERS:,} global headers")
        last_bytes = member.offset_data
        folder, name = os.path.split(member.name)
        stem, dot, part = name.partition(".")
        if member.isreg() and stem and dot:
            yield os.path.join(folder, stem), part.lower(), member, tar


class _Stream(io.BufferedIOBase):
    """A decompressed archive, which may not inflate too far.

    Past its end, tarfile goes on reading for every block of a size that a header claims.
    """

    def __init__(self, stream: IO[bytes], file: IO[bytes], archive: SourcePath) -> None:
        """Read `stream`, which decompresses `file`."""
        self._stream, self._file, self._archive = stream, file, archive
        self._num_bytes, self._is_at_end = 0, False

    def read(self, size: int | None = -1) -> bytes:
        data = self._stream.read(-1 if size is None else size)
        if not data and self._is_at_end:
            raise EOFError("it ends within a member")
        self._is_at_end = not data
        self._num_bytes += len(data)
        check_inflation(str(self._archive), self._file.tell(), self._num_bytes)
        return data


@contextmanager
def _open(archive: SourcePath, *, is_sparse: bool = False) -> Iterator[tarfile.TarFile]:
    """Open an archive: plain ones with seeking, so that skipped members are not read; compressed ones as a stream.

    A compressed archive is read to the end of the file, where its checksum is.
    """
    with open_source(archive, is_sparse=is_sparse) as file:
        reader = _reader_of(file)
        if reader is None:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_StrictTarInfo) as tar:
                yield tar
            return
        with reader(file) as stream:
            with tarfile.open(fileobj=_Stream(stream, file, archive), mode="r|", tarinfo=_StrictTarInfo) as tar:
                yield tar
            _read_padding(stream)


def _reader_of(file: IO[bytes]) -> Callable[[IO[bytes]], IO[bytes]] | None:
    """What decompresses an archive; None: it is plain."""
    first = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    return None if _is_header(first) else READERS.get(first[:2])  # pyright: ignore


def _is_header(block: bytes) -> bool:
    """Whether this is a header with its checksum: a plain archive may begin with a name like BZ1.jpg."""
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _read_padding(stream: IO[bytes]) -> None:
    num_bytes = 0
    while data := stream.read(1 << 16):
        num_bytes += len(data)
        if num_bytes > MAX_BYTES_AFTER_END:
            raise tarfile.ReadError(f"more than {MAX_BYTES_AFTER_END:,} bytes after its end")


def _is_image(part: str) -> bool:
    return "." not in part and has_image_extension(f"x.{part}")


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


def _map_archives(function: Callable[[SourcePath], T], archives: list[SourcePath]) -> list[T]:
    """Call a function that reads the headers of an archive for all of them, several at once."""
    num_processes = min(len(archives), len(os.sched_getaffinity(0)))
    num_bytes = sum(size_of(archive) for archive in archives)
    if num_bytes < MIN_POOL_BYTES and not all(isinstance(archive, str) for archive in archives):
        with ThreadPoolExecutor(NUM_THREADS) as threads:  # which wait for the server
            return list(threads.map(function, archives))
    if num_processes == 1 or num_bytes < MIN_POOL_BYTES:
        return [function(archive) for archive in archives]
    # A fork server that was started before knows no credentials that were set since.
    environment = {"initializer": _take_environment, "initargs": (dict(os.environ),)}
    with ProcessPoolExecutor(num_processes, get_context("forkserver"), **environment) as pool:
        return list(pool.map(function, archives))


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
