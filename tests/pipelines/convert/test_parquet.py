"""Parquet as Hugging Face writes it."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.convert.parquet import parquet_source
from pipelines.errors import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = ["cat", "dog"]


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(60, 200, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((70, 60), Image.Resampling.BILINEAR).save(file, "JPEG")
    return file.getvalue()


def write(path, first, num, *, names=NAMES, row_group_size=3):
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if names else None
    images = pa.array([{"bytes": jpeg(k), "path": f"{k}.jpg"} for k in range(first, first + num)], IMAGE)
    labels = pa.array([k % 2 if k % 5 else None for k in range(first, first + num)], pa.int64())
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())], metadata)
    pq.write_table(pa.table([images, labels], schema=schema), path, row_group_size=row_group_size)
    return path


def test_files_in_order_with_bytes_labels_and_names(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", 0, 8)
    write(tmp_path / "train-00001-of-00002.parquet", 8, 3)
    report = convert("parquet", f"{tmp_path}/train-*.parquet", tmp_path / "x.beton")
    reader = BetonReader(report.out)
    assert report.num_passed == reader.num_samples == 11
    assert [reader.image_bytes(k).tobytes() for k in range(11)] == [jpeg(k) for k in range(11)]
    assert reader.labels.tolist() == [k % 2 if k % 5 else -1 for k in range(11)]
    assert reader.class_names == NAMES


def test_rows_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.convert.parquet.ROWS_AT_ONCE", 2)
    paths = [str(write(tmp_path / f"{k}.parquet", 7 * k, 7)) for k in range(2)]
    source = parquet_source(paths, None, None)
    for start in range(14):
        for stop in range(start, 15):
            assert [item.image for item in source.read(start, stop)] == [jpeg(k) for k in range(start, stop)]


def test_plain_binary_columns_by_name(tmp_path):
    table = pa.table({"thumb": [b"x"], "photo": [jpeg(1)], "fine": pa.array([7], pa.uint8()), "label": ["text"]})
    pq.write_table(table, tmp_path / "x.parquet")
    path, out = str(tmp_path / "x.parquet"), tmp_path / "x.beton"
    with pytest.raises(DataError, match="choose --image-column; those that can be: thumb, photo"):
        convert("parquet", path, out)
    with pytest.raises(DataError, match="image_column 'label' is none of images"):
        convert("parquet", path, out, image_column="label")
    with pytest.raises(DataError, match="label_column 'label' must be a column of integers"):
        convert("parquet", path, out, image_column="photo")
    reader = BetonReader(convert("parquet", path, out, image_column="photo", label_column="fine").out)
    assert reader.labels.tolist() == [7]
    assert reader.class_names is None


def test_bad_files(tmp_path):
    bad = tmp_path / "bad.parquet"
    for content in (b"", b"hello", b"PAR1" + bytes(100) + b"PAR1"):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.parquet: not a readable parquet file"):
            convert("parquet", str(bad), tmp_path / "x.beton")
    content = bytearray(write(bad, 0, 6).read_bytes())
    content[1000:1400] = bytes(400)
    bad.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.parquet"):
        convert("parquet", str(bad), tmp_path / "x.beton")
    write(tmp_path / "a.parquet", 0, 2)
    pq.write_table(pa.table({"other": [1]}), bad)
    with pytest.raises(DataError, match="column image is missing"):
        convert("parquet", str(tmp_path), tmp_path / "x.beton")


def test_rows_that_only_name_a_file_do_not_open_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    images = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], IMAGE)
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="row 0: empty file"):
        convert("parquet", str(tmp_path / "x.parquet"), tmp_path / "x.beton", on_error="fail")


def save_table(path, columns, values, **options):
    pq.write_table(pa.Table.from_arrays(values, names=columns), path, **options)
    return str(path)


def test_ambiguous_columns(tmp_path):
    image, number = pa.array([jpeg(1)]), pa.array([3])
    out = tmp_path / "x.beton"
    path = save_table(tmp_path / "a.parquet", ["image", "fine_label", "coarse_label"], [image, number, number])
    with pytest.raises(DataError, match="choose --label-column; those that can be: fine_label, coarse_label"):
        convert("parquet", path, out)
    assert BetonReader(convert("parquet", path, out, label_column="fine_label").out).labels.tolist() == [3]
    for columns in (["image", "label", "label"], ["image", "image", "label"]):
        path = save_table(tmp_path / "b.parquet", columns, [image, image if columns[1] == "image" else number, number])
        with pytest.raises(DataError, match=f"column {columns[1]} is there more than once"):
            convert("parquet", path, tmp_path / "y.beton")


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    """64 rows that are one entry of 40 MB in a dictionary, in 2 kB: 2.5 GB if they were decoded at once."""
    zeros = pa.array([bytes(40 << 20)])
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), zeros)
    options = {"compression": "zstd", "store_schema": False}
    path = save_table(tmp_path / "a.parquet", ["image"], [rows], **options)
    assert_read_in_little_memory(path, 40 << 20)
    lie_about_size(path)
    assert_read_in_little_memory(path, 40 << 20)


def assert_read_in_little_memory(path: str, image_bytes: int) -> None:
    before_bytes = pa.total_allocated_bytes()
    for item in parquet_source([path], None, None).read(0, 5):
        assert isinstance(item.image, bytes)
        assert len(item.image) == image_bytes
        assert pa.total_allocated_bytes() - before_bytes < 200 << 20


def test_rows_that_begin_alike_do_not_fill_the_memory(tmp_path):
    """64 rows of 8 MB, of which the second to last take a few bytes each in the encoding DELTA_BYTE_ARRAY."""
    options = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
    path = save_table(tmp_path / "a.parquet", ["image"], [pa.array([bytes(8 << 20)] * 64)], **options)
    assert_read_in_little_memory(path, 8 << 20)


def test_a_large_row_group_is_not_read_at_once(tmp_path):
    rng = np.random.default_rng(0)
    images = pa.array([rng.bytes(2 << 20) for _ in range(120)])
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    path = save_table(tmp_path / "a.parquet", ["image"], [images], **options)
    del images
    assert_read_in_little_memory(path, 2 << 20)


def test_a_column_of_zeros_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.files.MAX_INFLATED_BYTES", 1 << 20)
    zeros = pa.array([bytes(1 << 20)] * 3)
    path = save_table(tmp_path / "a.parquet", ["image"], [zeros], compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=r"a\.parquet: .* bytes of it become 3,145,.* at most 100 times"):
        convert("parquet", path, tmp_path / "x.beton")
    lie_about_size(path)
    with pytest.raises(DataError, match=r"a\.parquet: .* bytes of it become 3,145,.* at most 100 times"):
        convert("parquet", path, tmp_path / "x.beton")


def lie_about_size(path: str, says: int = 1000) -> None:
    """Let the footer say that a file's first column has few bytes once decompressed."""
    column = pq.read_metadata(path).row_group(0).column(0)
    truth = varint(2 * column.total_uncompressed_size)
    with open(path, "r+b") as file:
        content = file.read()
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        file.seek(start)
        file.write(content[start:].replace(truth, varint(2 * says, len(truth))))
    assert pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size == says


def varint(value: int, length: int = 0) -> bytes:
    """Thrift's varint, filled up to a length."""
    digits = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 7 * length), 7)]
    return bytes(digit | 128 for digit in digits[:-1]) + bytes(digits[-1:])


def test_a_name_that_is_not_utf8(tmp_path):
    path = os.path.join(tmp_path, os.fsdecode(b"caf\xe9.parquet"))
    os.rename(write(tmp_path / "a.parquet", 0, 2), path)
    assert convert("parquet", path, tmp_path / "x.beton").num_images == 2


def test_metadata_that_are_too_large(tmp_path):
    with (tmp_path / "a.parquet").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(0, 2)
        file.write((900 << 20).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: .*943,718,400 bytes of metadata"):
        convert("parquet", str(tmp_path / "a.parquet"), tmp_path / "x.beton")


@pytest.mark.parametrize("item", [b"\0", b"\x1c\0\0"], ids=["flat", "nested"])
def test_metadata_of_too_many_structures(tmp_path, item):
    num = 1_200_000
    footer = b"\x59\xfc" + varint(num) + item * num + b"\0"  # of a field, a list of structures
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: .*more than 500,000 structures"):
        convert("parquet", str(path), tmp_path / "x.beton")


def test_metadata_that_contradict_themselves(tmp_path):
    """Histograms of definition levels with one number instead of three, at which a ColumnChunkMetaData aborts."""
    path = write(tmp_path / "a.parquet", 0, 3)
    content = path.read_bytes()
    assert content.count(b"\x19\x06\x19\x36")
    path.write_bytes(content.replace(b"\x19\x06\x19\x36", b"\x09\x06\x19\x36"))
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file .*histogram"):
        convert("parquet", str(path), tmp_path / "x.beton")
