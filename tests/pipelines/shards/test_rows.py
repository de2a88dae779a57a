"""The rows of a .beton: 24 bytes a sample, with a checksum of the image and of the row."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from pipelines.beton import JPG, RAW
from pipelines.beton.format import MAX_LABEL
from pipelines.shards.rows import (
    HEAD_BYTES,
    MAX_IMAGE_BYTES,
    RAW_BIT,
    ROW,
    first_bad_row,
    is_intact,
    modes_of,
    num_bytes_of,
    row_crc32,
    rows_path,
)

IMAGE = bytes(range(12))


def row(ptr: int = 8192, num_bytes: int = 12, height: int = 2, width: int = 2, label: int = 3) -> np.ndarray:
    rows = np.array([(ptr, num_bytes, height, width, label, 0)], ROW)
    rows["crc32"] = row_crc32(rows.tobytes()[:HEAD_BYTES], IMAGE)
    return rows


def test_the_layout_is_the_documented_one():
    assert (ROW.itemsize, HEAD_BYTES) == (24, 20)
    found = row(ptr=1 << 40, num_bytes=12 | RAW_BIT, height=2, width=259, label=-1).tobytes()
    assert found[:20] == bytes([0, 0, 0, 0, 0, 1, 0, 0, 12, 0, 0, 128, 2, 0, 3, 1, 255, 255, 255, 255])
    assert int.from_bytes(found[20:], "little") == zlib.crc32(IMAGE + found[:20])
    assert rows_path(Path("a/x.beton")) == Path("a/x.beton.rows")


def test_modes_and_numbers_of_bytes():
    rows = np.array([(0, 7, 1, 1, 0, 0), (0, RAW_BIT | 3, 1, 1, 0, 0), (0, MAX_IMAGE_BYTES, 1, 1, 0, 0)], ROW)
    assert modes_of(rows).tolist() == [JPG, RAW, JPG]
    assert num_bytes_of(rows).tolist() == [7, 3, MAX_IMAGE_BYTES]
    assert num_bytes_of(rows).dtype == np.int64


def test_every_changed_bit_of_a_row_or_its_image_is_found():
    whole = row().tobytes()
    assert is_intact(whole, IMAGE)
    assert is_intact(row().data, np.frombuffer(IMAGE, np.uint8).data)
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        assert not is_intact(changed, IMAGE)
    for bit in range(8 * len(IMAGE)):
        changed = bytearray(IMAGE)
        changed[bit // 8] ^= 1 << bit % 8
        assert not is_intact(whole, changed)
    assert not is_intact(whole, IMAGE[:-1])
    assert not is_intact(whole[:-1], IMAGE)
    assert not is_intact(whole + b"\0", IMAGE)


@pytest.mark.parametrize(
    "bad",
    [
        {"ptr": 8193},
        {"ptr": 2**64 - 1},
        {"num_bytes": 13},
        {"num_bytes": 0},
        {"num_bytes": RAW_BIT},
        {"num_bytes": RAW_BIT | 11},
        {"height": 0},
        {"width": 0},
        {"label": -2},
        {"label": MAX_LABEL + 1},
    ],
    ids=str,
)
def test_rows_that_no_image_can_have(bad):
    good = np.concatenate([row(), row(num_bytes=12 | RAW_BIT), row(label=-1), row(label=MAX_LABEL)])
    assert first_bad_row(good, 8204, MAX_LABEL) is None
    assert first_bad_row(np.concatenate([good, row(**bad), row(**bad)]), 8204, MAX_LABEL) == 4
