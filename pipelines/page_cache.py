"""The system's page cache: what of a file lies in it, and how it leaves it."""

import mmap
import os
from collections.abc import Iterable

MAX_GAP_BYTES = 128 << 10  # between images: a smaller gap is read too, rather than splitting the request
NUM_PROBES = 16


def is_cached(descriptor: int, places: Iterable[int]) -> bool:
    """Whether the bytes at these offsets are all in the page cache (if the file system can tell)."""
    byte = bytearray(1)
    try:
        return all(os.preadv(descriptor, [byte], place, os.RWF_NOWAIT) for place in places)
    except OSError:  # BlockingIOError: not in the cache; others: the file system cannot tell
        return False


def drop_pages(descriptor: int, file_map: mmap.mmap, start: int, stop: int) -> None:
    """Drop whole pages, including those shared with a neighbour, which is read again if it is used later.

    Args:
        descriptor: The open file.
        file_map: Its memory map: a mapped page stays in the cache.
        start: First byte.
        stop: One after the last byte.
    """
    start -= start % mmap.PAGESIZE
    num_bytes = min(-(-stop // mmap.PAGESIZE) * mmap.PAGESIZE, len(file_map)) - start
    file_map.madvise(mmap.MADV_DONTNEED, start, num_bytes)
    os.posix_fadvise(descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)
