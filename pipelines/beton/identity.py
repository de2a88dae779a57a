"""The identity of a .beton file: what tells it from another file of the same name, in bounded time."""

# N samples

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.beton.reader import BetonReader

# Number of images, number of bytes, CRC-32 of the tables, CRC-32 of some images' bytes. (blake2b takes 8 times as long
# for the 61 MB of tables of 1.28 M images.) A loader of other data has numbers of its own: `BatchSource.identity`.
Identity = list[int]

_NUM_IMAGES = 64  # evenly spaced in the file: a disk of 8 ms a seek needs half a second for them
_IMAGE_BYTES = 4096  # of each image
_BLOCK_BYTES = 4 << 20
# What is said of a file whose identity differs first at this position.
_DIFFERENCES = (
    "{} images instead of {}",
    "{} bytes instead of {}",
    "as many images and bytes, but other labels, sizes or positions of the images",
    "as many images and bytes, but other images",
)


def identity_of(reader: BetonReader) -> Identity:
    """The identity of an open file; equal for a copy of it, on any machine and at any time.

    All tables are read (header, field descriptors, metadata, allocation table), hence the labels and the size and
    encoded size of every image; and bytes from the middle of some images. It misses a change of single images that are
    not among these and keep their encoded size: `fastssl verify` reads everything.

    Raises:
        DataError: the file was cut short.
    """
    num_bytes = len(reader.mmap)
    tables = images = 0
    for start, stop in ((0, reader.data_start), (reader.alloc_table_start, num_bytes)):
        for first in range(start, stop, _BLOCK_BYTES):
            tables = zlib.crc32(reader.read(np.dtype(np.uint8), first, min(_BLOCK_BYTES, stop - first)).data, tables)
    some = np.linspace(0, reader.num_samples - 1, min(_NUM_IMAGES, reader.num_samples)).astype(int)
    sizes = np.minimum(reader.data_bytes[some], _IMAGE_BYTES).astype(int).tolist()
    starts = (reader.data_ptr[some] + reader.data_bytes[some] // 2).astype(int) - np.array(sizes) // 2
    blocks = list(zip(starts.tolist(), sizes, strict=True))
    for start, size in blocks:  # a disk can order the requests, and a network has them under way together
        os.posix_fadvise(reader.descriptor, start, size, os.POSIX_FADV_WILLNEED)
    for start, size in blocks:
        images = zlib.crc32(reader.read(np.dtype(np.uint8), start, size).data, images)
    return [reader.num_samples, num_bytes, tables, images]


def difference(found: Identity, expected: Identity) -> str | None:
    """How a file differs from the expected one, after the words "it has"; None: it does not.

    Two numbers are the identity of an older checkpoint: only these are compared.
    """
    for what, ours, theirs in zip(_DIFFERENCES, found, expected, strict=False):
        if ours != theirs:
            return what.format(ours, theirs)
    return None
