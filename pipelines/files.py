"""Opens a user's files: regular files only, and no more bytes than a limit. Reads files that stay open."""

import errno
import os
import stat
import weakref
from io import BufferedReader
from pathlib import Path

import numpy as np

from pipelines.errors import DataChangedError, DataError

MAX_FILE_BYTES = 256 << 20  # of one image: 3 bytes for each of the pixels that Pillow allows at most
# Compressed data that become more bytes than this, and more than MAX_INFLATION times their own, are refused: images are
# compressed already, and what shrinks further is mostly made to fill a memory or to take hours.
MAX_INFLATED_BYTES = 256 << 20
MAX_INFLATION = 100


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading. A pipe, which may block, or a device, which may never end, is refused.

    Raises:
        OSError: no such file, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe, do not wait for a writer
    except ValueError:
        raise OSError(errno.EINVAL, "a NUL in a file name", os.fspath(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(descriptor, "rb")


def check_inflation(path: str | os.PathLike[str], in_file: int, num_bytes: int) -> None:
    """Refuse compressed data that become far more bytes than images do.

    Args:
        path: The file, for the message.
        in_file: Number of compressed bytes.
        num_bytes: Number of bytes that they become, or have become so far.
    Raises:
        DataError: more than `MAX_INFLATED_BYTES`, and than `MAX_INFLATION` times the compressed bytes.
    """
    if num_bytes > max(MAX_INFLATED_BYTES, MAX_INFLATION * in_file):
        raise DataError(
            f"{path}: {in_file:,} bytes of it become {num_bytes:,} or more, and at most {MAX_INFLATION} times as many "
            "are read; write the images without compressing them again"
        )


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Contents of a regular file of at most `max_bytes` bytes.

    Raises:
        OSError: see `open_regular`; or the file has more bytes.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise OSError(errno.EFBIG, f"{num_bytes:,} bytes; at most {max_bytes:,} are read", os.fspath(path))
        return file.read(num_bytes)


def opened_with(owner: object, path: Path) -> int:
    """A descriptor for reading at offsets, which is closed with its owner.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


def state_of(descriptor: int) -> tuple[int, int]:
    """Size in bytes and time of the last modification in ns. (Removing or renaming a file changes neither.)"""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def check_state(path: Path, descriptor: int, state: tuple[int, int]) -> None:
    """Compare an open file with its state at opening; takes about a microsecond.

    Raises:
        DataChangedError: the file was changed in place.
    """
    now = state_of(descriptor)
    if now != state:
        what = "was written to" if now[0] == state[0] else f"went from {state[0]} to {now[0]} bytes"
        raise DataChangedError(
            f"{path}: {what} while in use: restore it, then start again (run.resume=auto resumes a training)"
        )


def read_records(descriptor: int, dtype: np.dtype, start: int, num: int) -> np.ndarray | None:
    """Read `num` records from byte `start` of an open file; None: it ends before."""
    records = np.empty(num, dtype)
    left = records.view(np.uint8).data
    while left:
        num_read = os.preadv(descriptor, [left], start)
        if not num_read:
            return None
        left, start = left[num_read:], start + num_read
    return records
