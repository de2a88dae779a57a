"""Arrays in a .npz file. Images are read one after the other; nothing is unpickled."""

# N images of H x W pixels

import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.convert.source import MAX_ITEMS, MAX_LABEL, Item, Source, array_source, fingerprint
from pipelines.errors import DataError, one_line
from pipelines.files import MAX_FILE_BYTES, check_inflation, open_regular

MAX_HEADER_BYTES = 1000  # of an array; numpy writes about 120 for a plain one
READ_BYTES = 1 << 20  # at a time, of images that are smaller
LOCAL_HEADER_BYTES = 30  # of a member of a zip file, before its name
MAX_DEFLATE_RATIO = 1032  # the largest that zlib reaches (zlib.net/zlib_tech.html)
MAX_COLUMN_MAJOR_BYTES = 1 << 30  # of an array that has to be in memory as a whole


def npz_source(path: Path, split: str | None = None) -> Source:
    """Arrays `x` uint8 [N, H, W] or [N, H, W, 3] and optional `y` int [N]; with a split, `x_<split>`, `y_<split>`.

    Raises:
        DataError: no such file or array, arrays of another kind, or sizes that the file cannot hold.
    """
    suffix = f"_{split}" if split else ""
    x_key, y_key = f"x{suffix}", f"y{suffix}"
    name = str(path.resolve())
    facts = fingerprint([name], suffix.encode(errors="surrogateescape"))
    with _open_archive(path) as archive:
        keys = [member.removesuffix(".npy") for member in archive.namelist()]
        if x_key not in keys:
            raise DataError(f"{path}: no array {x_key} in it; it has: {', '.join(keys) or 'nothing'}")
        x = _read_header(archive, path, x_key)
        if x.dtype != np.uint8 or len(x.shape) not in (3, 4) or x.shape[3:] not in ((), (3,)) or not x.num_bytes:
            kinds = "uint8 [N, H, W] or [N, H, W, 3]"
            raise DataError(f"{path}: {x_key} must be {kinds}, not {x.dtype} {list(x.shape)}")
        if x.shape[0] > MAX_ITEMS:
            raise DataError(f"{path}: {x.shape[0]:,} images; at most {MAX_ITEMS:,} are read from one file")
        labels = _read_labels(archive, path, y_key, x.shape[0]) if y_key in keys else np.full(x.shape[0], -1)
        if x.is_column_major:
            return array_source(name, _read_column_major(archive, path, x_key, x), labels, facts)
    image_bytes = x.num_bytes // x.shape[0]
    if image_bytes > MAX_FILE_BYTES:
        raise DataError(f"{path}: images of {image_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read")

    def read(start: int, stop: int) -> Iterator[Item]:
        with _open_archive(path) as archive, archive.open(f"{x_key}.npy") as values:
            values.seek(x.header_bytes + start * image_bytes)
            num_per_read = max(READ_BYTES // image_bytes, 1)
            for first in range(start, stop, num_per_read):
                numbers = range(first, min(first + num_per_read, stop))
                block = values.read(len(numbers) * image_bytes)
                for i, pixels in zip(numbers, np.frombuffer(block, np.uint8).reshape(-1, *x.shape[1:]), strict=True):
                    yield Item(f"{name}, image {i}", pixels, int(labels[i]))
            values.read(1)  # at the end of the array, this compares the checksum

    def pick(numbers: Iterator[int]) -> Iterator[Item]:
        first_byte = _values_in_file(path, x_key) + x.header_bytes
        with open_regular(path) as file:
            for i in numbers:
                file.seek(first_byte + i * image_bytes)
                pixels = np.frombuffer(file.read(image_bytes), np.uint8).reshape(x.shape[1:])
                yield Item(f"{name}, image {i}", pixels, int(labels[i]))

    return Source(name=name, num_items=x.shape[0], read=read, pick=pick, fingerprint=facts)


def _values_in_file(path: Path, key: str) -> int:
    """Where an array's bytes begin in the file; reads them once, which compares their checksum.

    Raises:
        DataError: the array is compressed.
    """
    with _open_archive(path) as archive:
        member = archive.getinfo(f"{key}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise DataError(
                f"{path}: a compressed array cannot be read in random order: write it with numpy.savez, or leave "
                "--shuffle out"
            )
        with archive.open(member) as values:
            while values.read(1 << 20):
                pass
    with open_regular(path) as file:
        file.seek(member.header_offset)
        local = file.read(LOCAL_HEADER_BYTES)
    # The lengths of the name and of the extra field end the local header, which may differ from the directory's.
    num_name, num_extra = struct.unpack("<HH", local[-4:])
    return member.header_offset + len(local) + num_name + num_extra


class _Header(NamedTuple):
    """What an array's header says.

    Attributes:
        shape: Shape.
        dtype: A type without objects.
        is_column_major: Whether the first index varies fastest.
        num_bytes: Number of bytes of the values.
        header_bytes: Number of bytes before the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    is_column_major: bool
    num_bytes: int
    header_bytes: int


def _read_header(archive: zipfile.ZipFile, path: Path, key: str) -> _Header:
    """Read an array's header and compare it with the sizes in the archive, so that nothing invented is allocated."""
    member = archive.getinfo(f"{key}.npy")
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: MAX_DEFLATE_RATIO}.get(member.compress_type, 0)
    with archive.open(member) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("array of an unusual format version")
        shape, is_column_major, dtype = np.lib.format.read_array_header_1_0(file, MAX_HEADER_BYTES)
        header_bytes = file.tell()
    num_bytes = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=1) < 0:
        raise ValueError("array of objects")
    if header_bytes + num_bytes != member.file_size or member.file_size > ratio * member.compress_size:
        raise ValueError(f"array of {num_bytes:,} bytes that are not in the file")
    check_inflation(path, member.compress_size, member.file_size)
    return _Header(shape, dtype, is_column_major, num_bytes, header_bytes)


def _read_labels(archive: zipfile.ZipFile, path: Path, key: str, num: int) -> np.ndarray:
    y = _read_header(archive, path, key)
    if y.dtype.kind not in "iu" or y.shape != (num,):
        raise DataError(f"{path}: {key} must be integers [{num}], not {y.dtype} {list(y.shape)}")
    labels = np.frombuffer(archive.read(f"{key}.npy"), y.dtype, offset=y.header_bytes)
    if not -1 <= int(labels.min()) <= int(labels.max()) <= MAX_LABEL:
        raise DataError(f"{path}: {key} must be in -1..{MAX_LABEL}, not {labels.min()}..{labels.max()}")
    return labels.astype(np.int64)


def _read_column_major(archive: zipfile.ZipFile, path: Path, key: str, x: _Header) -> np.ndarray:
    if x.num_bytes > MAX_COLUMN_MAJOR_BYTES:
        raise DataError(f"{path}: {key} is too large in column-major order: save numpy.ascontiguousarray of it")
    values = np.frombuffer(archive.read(f"{key}.npy"), np.uint8, offset=x.header_bytes)
    return values.reshape(x.shape, order="F")


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        message = f"{path}: not a readable .npz of plain arrays ({reason}); write it with numpy.savez"
        raise DataError(message) from error
