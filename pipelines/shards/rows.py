"""The rows file of a .beton: where each image lies, its size, label and checksum, in the order of the samples.

`x.beton.rows` holds 24 bytes a sample and nothing else, so one range of it describes a block of samples. The .beton's
own tables need three reads for that, and FFCV's allocation table may be in another order.
"""

import struct
from pathlib import Path
from typing import TypeAlias

import numpy as np
from isal.isal_zlib import crc32  # zlib's, 14 times as fast

Bytes: TypeAlias = bytes | bytearray | memoryview  # of an array: its `.data`

ROW = np.dtype(
    [
        ("ptr", "<u8"),  # offset of the image's bytes in the .beton
        ("num_bytes", "<u4"),  # and their number, with RAW_BIT
        ("height", "<u2"),  # px
        ("width", "<u2"),  # px
        ("label", "<i4"),  # -1: none
        ("crc32", "<u4"),  # of the image's bytes and then of the fields above, see `row_crc32`
    ]
)
RAW_BIT = 1 << 31  # in num_bytes: the image is stored as raw pixels
MAX_IMAGE_BYTES = RAW_BIT - 1
_HEAD = struct.Struct("<QIHHi")  # a row without its checksum
HEAD_BYTES = _HEAD.size


def rows_path(beton: Path) -> Path:
    """`x.beton` -> `x.beton.rows`."""
    return beton.with_name(f"{beton.name}.rows")


def num_bytes_of(rows: np.ndarray) -> np.ndarray:
    """int64 [N], number of bytes of each image."""
    return (rows["num_bytes"] & np.uint32(MAX_IMAGE_BYTES)).astype(np.int64)


def modes_of(rows: np.ndarray) -> np.ndarray:
    """uint8 [N], `JPG` or `RAW` of `pipelines.beton`."""
    return (rows["num_bytes"] >> np.uint32(31)).astype(np.uint8)


def row_crc32(head: Bytes, image: Bytes) -> int:
    """The checksum of a row: CRC-32 of the image's bytes, continued over the row's first `HEAD_BYTES` bytes.

    A row that is paired with another image, or whose label or size changed, has another checksum.
    """
    return crc32(head, crc32(image))


def row_head(ptr: int, num_bytes: int, height_px: int, width_px: int, label: int, *, is_raw: bool) -> bytes:
    """A row without its checksum, `HEAD_BYTES` bytes; num_bytes is at most `MAX_IMAGE_BYTES`."""
    return _HEAD.pack(ptr, num_bytes | (RAW_BIT if is_raw else 0), height_px, width_px, label)


def build_rows(
    *, ptr: np.ndarray, num_bytes: np.ndarray, modes: np.ndarray, sizes: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Rows without checksums (0) from the tables of a file; see `BetonTables`.

    Args:
        ptr: uint64 [N].
        num_bytes: uint64 [N], at most `MAX_IMAGE_BYTES`.
        modes: uint8 [N].
        sizes: int [N, 2], (height, width) in pixels.
        labels: int64 [N].
    Returns:
        ROW [N].
    """
    rows = np.zeros(len(ptr), ROW)
    rows["ptr"], rows["label"] = ptr, labels
    rows["num_bytes"] = num_bytes.astype(np.uint32) | modes.astype(np.uint32) << np.uint32(31)
    rows["height"], rows["width"] = sizes[:, 0], sizes[:, 1]
    return rows


def is_intact(row_bytes: Bytes, image: Bytes) -> bool:
    """Whether a row (24 bytes) and its image's bytes are those that were written."""
    row = bytes(row_bytes)
    if len(row) != ROW.itemsize:
        return False
    return row_crc32(row[:HEAD_BYTES], image) == int.from_bytes(row[HEAD_BYTES:], "little")


def first_bad_row(rows: np.ndarray, num_file_bytes: int, max_label: int) -> int | None:
    """Index of the first row that no image of a file can have, such as one that leads outside; None: all can be.

    Args:
        rows: ROW [N].
        num_file_bytes: Size of the .beton.
        max_label: Largest label.
    """
    ptr, num_bytes, end = rows["ptr"], num_bytes_of(rows).astype(np.uint64), np.uint64(num_file_bytes)
    pixels = rows["height"].astype(np.uint64) * rows["width"]
    bad = (ptr > end) | (num_bytes > end - np.minimum(ptr, end)) | (num_bytes == 0) | (pixels == 0)
    bad |= (modes_of(rows) == 1) & (num_bytes != np.uint64(3) * pixels)
    bad |= (rows["label"] < -1) | (rows["label"] > max_label)
    found = np.flatnonzero(bad)
    return int(found[0]) if len(found) else None
