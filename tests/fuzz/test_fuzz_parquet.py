"""Damaged and invented parquet files."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.fuzz import cases, mutate_bytes, num_cases
from tests.helpers.fuzz_convert import convert_or_refuse

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

ODD_SIZES = (0, 1, -1, 1000, 1 << 20, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 62))
NAMES = ["image", "image", "img", "label", "label", "fine_label", "labels", "x\n\x1b[2J", "bytes", "a.b", ""]


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def varint(value: int) -> bytes:
    """An integer as Thrift writes it."""
    value = value * 2 if value >= 0 else -value * 2 - 1
    digits = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes(digit | 128 for digit in digits[:-1]) + bytes(digits[-1:])


def column(rng: np.random.Generator) -> pa.Array:
    images = [png(k) for k in range(6)]
    choices = (
        lambda: pa.array(images),
        lambda: pa.array([{"bytes": data, "path": "../x"} for data in images]),
        lambda: pa.array(images, pa.large_binary()),
        lambda: pa.array([None, b"", *images[:4]]),
        lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 6, pa.int32()), pa.array(images[:1])),
        lambda: pa.array(range(6)),
        lambda: pa.array([-1, 2**63 - 1, None, 0, -5, 10**6]),
        lambda: pa.array([2**64 - 1] * 6, pa.uint64()),
        lambda: pa.array(["text"] * 6),
        lambda: pa.array([[1]] * 6),
        lambda: pa.array([{"bytes": {"bytes": data}} for data in images]),
    )
    return choices[int(rng.integers(len(choices)))]()


def test_bytes(tmp_path):
    whole = io.BytesIO()
    table = pa.table({"image": [{"bytes": png(k), "path": f"{k}"} for k in range(6)], "label": list(range(6))})
    pq.write_table(table, whole, row_group_size=2)
    data = whole.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for case in cases("parquet bytes", fraction=0.35):
        changed = mutate_bytes(data, case.rng)
        if case.rng.integers(2):  # the metadata alone, with their right length
            metadata = mutate_bytes(data[footer:-8], case.rng)
            changed = data[:footer] + metadata + len(metadata).to_bytes(4, "little") + b"PAR1"
        (tmp_path / "x.parquet").write_bytes(changed)
        convert_or_refuse(case, "parquet", tmp_path / "x.parquet")


def test_schemas(tmp_path):
    for case in cases("parquet schemas", fraction=0.35):
        rng = case.rng
        names = [NAMES[int(rng.integers(len(NAMES)))] for _ in range(int(rng.integers(1, 5)))]
        columns = [column(rng) for _ in names]
        metadata = {b"huggingface": mutate_bytes(b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}', rng)}
        table = pa.Table.from_arrays(columns, names=names).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=int(rng.integers(1, 7)))
        convert_or_refuse(case, "parquet", tmp_path / "x.parquet")


def test_sizes(tmp_path, monkeypatch):
    """A footer or the header of a page that claims other sizes, offsets or numbers of rows, or a page that inflates."""
    monkeypatch.setattr("pipelines.files.MAX_INFLATED_BYTES", 1 << 20)
    wholes = []
    for images in ([png(k) for k in range(6)], [bytes(1 << 20)] * 6):
        for has_dictionary in (False, True):
            file, table = io.BytesIO(), pa.table({"image": images, "label": list(range(6))})
            pq.write_table(table, file, compression="zstd", use_dictionary=has_dictionary)
            wholes.append((file.getvalue(), numbers_of(pq.read_metadata(file).row_group(0))))
    for case in cases("parquet sizes", fraction=0.3):
        data, numbers = wholes[int(case.rng.integers(len(wholes)))]
        for _ in range(int(case.rng.integers(1, 3))):
            data = with_odd_size(data, numbers, case.rng)
        (tmp_path / "x.parquet").write_bytes(data)
        convert_or_refuse(case, "parquet", tmp_path / "x.parquet")


def numbers_of(group: pq.RowGroupMetaData) -> list[int]:
    """Sizes, offsets and numbers of rows in a footer."""
    names = ("num_values", "total_uncompressed_size", "total_compressed_size", "data_page_offset")
    columns = [group.column(k) for k in range(group.num_columns)]
    of_columns = [getattr(column, name) for column in columns for name in names]
    dictionaries = [column.dictionary_page_offset for column in columns if column.has_dictionary_page]
    return [group.num_rows, group.total_byte_size, *of_columns, *dictionaries]


def with_odd_size(data: bytes, numbers: list[int], rng: np.random.Generator) -> bytes:
    """Replace a number of the footer, wherever it is there, or one of the first bytes of the first page's header."""
    start = max(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), 0)
    new = varint(ODD_SIZES[int(rng.integers(len(ODD_SIZES)))])
    if rng.integers(4) == 0:
        at = 4 + int(rng.integers(1, 12))
        return data[:at] + new + data[at + int(rng.integers(6)) :]
    footer = data[start:-8].replace(varint(numbers[int(rng.integers(len(numbers)))]), new)
    return data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
