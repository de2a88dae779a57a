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

NAMES = ["image", "image", "img", "label", "label", "fine_label", "labels", "x\n\x1b[2J", "bytes", "a.b", ""]


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


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
    for case in cases("parquet bytes", fraction=0.4):
        changed = mutate_bytes(data, case.rng)
        if case.rng.integers(2):  # the metadata alone, with their right length
            metadata = mutate_bytes(data[footer:-8], case.rng)
            changed = data[:footer] + metadata + len(metadata).to_bytes(4, "little") + b"PAR1"
        (tmp_path / "x.parquet").write_bytes(changed)
        convert_or_refuse(case, "parquet", tmp_path / "x.parquet")


def test_schemas(tmp_path):
    for case in cases("parquet schemas", fraction=0.3):
        rng = case.rng
        names = [NAMES[int(rng.integers(len(NAMES)))] for _ in range(int(rng.integers(1, 5)))]
        columns = [column(rng) for _ in names]
        metadata = {b"huggingface": mutate_bytes(b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}', rng)}
        table = pa.Table.from_arrays(columns, names=names).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=int(rng.integers(1, 7)))
        convert_or_refuse(case, "parquet", tmp_path / "x.parquet")
