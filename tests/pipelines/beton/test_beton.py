"""The .beton format: our writer against stock FFCV's Loader, stock FFCV's writer against our reader."""

import hashlib
import io
import json
import os
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import JPG, RAW, BetonReader, BetonWriter, inspect
from pipelines.beton.format import ALLOCATION, FIELD, HEADER, MAX_LABEL, METADATA, PAGE_BYTES
from pipelines.beton.identity import difference
from pipelines.contact_sheet import contact_sheet
from pipelines.errors import DataError
from pipelines.shards.rows import rows_path
from tests.helpers import stock_ffcv

# FFCV decodes with libjpeg-turbo's fast integer DCT (TJFLAG_FASTDCT), Pillow with the accurate one. On 100
# photographs: mean difference 1.2 levels (largest 2.1), largest of a pixel 22; less on these smooth pictures.
JPEG_MAX_LEVELS, JPEG_MEAN_LEVELS = 8, 2.0


def picture(seed: int, height_px: int, width_px: int) -> np.ndarray:
    """A smooth random colour picture: noise has no place in a JPEG."""
    noise = np.random.default_rng(seed).integers(60, 200, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width_px, height_px), Image.Resampling.BILINEAR))


def jpeg(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def write_small(path: Path, num: int = 5) -> list[np.ndarray]:
    images = [picture(i, 8 + i, 12) for i in range(num)]
    with BetonWriter(path, class_names=["even", "odd"], source="test") as writer:
        for i, image in enumerate(images):
            if i % 2:
                writer.write_jpeg(jpeg(image), height_px=8 + i, width_px=12, label=1)
            else:
                writer.write_raw(image, label=0)
    return images


def test_round_trip(tmp_path):
    images = write_small(tmp_path / "x.beton")
    reader = BetonReader(tmp_path / "x.beton")
    assert reader.num_samples == 5
    assert reader.sizes.tolist() == [[8 + i, 12] for i in range(5)]
    assert reader.sizes.dtype == np.int32
    assert reader.labels.tolist() == [0, 1, 0, 1, 0]
    assert reader.modes.tolist() == [RAW, JPG, RAW, JPG, RAW]
    assert reader.class_names == ["even", "odd"]
    np.testing.assert_array_equal(reader.decode(2), images[2])
    assert reader.image_bytes(1).tobytes() == jpeg(images[1])
    np.testing.assert_array_equal(reader.decode(1), np.asarray(Image.open(io.BytesIO(jpeg(images[1])))))


def test_stock_ffcv_reads_constant_size(tmp_path):
    images = [picture(i, 20, 24) for i in range(10)]
    with BetonWriter(tmp_path / "x.beton") as writer:
        for i, image in enumerate(images[:5]):
            writer.write_raw(image, label=i)
        for i, image in enumerate(images[5:], 5):
            writer.write_jpeg(jpeg(image, progressive=i == 6), height_px=20, width_px=24, label=i)
        grey = np.asarray(Image.fromarray(images[0]).convert("L"))
        writer.write_jpeg(jpeg(grey), height_px=20, width_px=24, label=-1)
    ours = BetonReader(tmp_path / "x.beton")
    pixels, labels = stock_ffcv.read(tmp_path / "x.beton", "whole")
    assert labels.tolist() == [*range(10), -1]
    np.testing.assert_array_equal(pixels[:5], images[:5])
    for i in range(5, 11):
        off = np.abs(pixels[i].astype(int) - ours.decode(i))
        assert off.max() <= JPEG_MAX_LEVELS
        assert off.mean() <= JPEG_MEAN_LEVELS


@pytest.mark.parametrize("os_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stock_ffcv_reads_varied_sizes_over_several_pages(tmp_path, os_cache):
    """Raw samples that fill pages and one that needs a larger page, seen through FFCV's centre crop."""
    images = [np.full((side, side + 2, 3), 10 * i, np.uint8) for i, side in enumerate((1200, 64, 1200, 1700, 3, 900))]
    with BetonWriter(tmp_path / "x.beton") as writer:
        for i, image in enumerate(images):
            writer.write_raw(image, label=i)
    reader = BetonReader(tmp_path / "x.beton")
    page_bytes = int(reader.mmap[: HEADER.itemsize].view(HEADER)["page_size"][0])
    assert page_bytes == 2 * PAGE_BYTES
    last = reader.data_ptr + reader.data_bytes - np.uint64(1)
    np.testing.assert_array_equal(reader.data_ptr // page_bytes, last // page_bytes)
    pixels, labels = stock_ffcv.read(tmp_path / "x.beton", "centre_16px", os_cache=os_cache)
    assert labels.tolist() == list(range(6))
    np.testing.assert_array_equal(pixels[:, 0, 0, 0], 10 * np.arange(6))


def test_reads_what_stock_ffcv_writes(tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    data = [(picture(i, 10 + i, 16), 7 - i) for i in range(6)]
    path = tmp_path / "stock.beton"
    fields = {"image": RGBImageField(write_mode="smart", smart_threshold=16 * 13 * 3), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(data)
    reader = BetonReader(path)
    assert reader.sidecar == {}
    assert reader.class_names is None
    assert reader.labels.tolist() == [7 - i for i in range(6)]
    assert reader.modes.tolist() == [RAW] * 4 + [JPG] * 2
    for i, (image, _) in enumerate(data[:4]):
        np.testing.assert_array_equal(reader.decode(i), image)
    assert np.abs(reader.decode(5).astype(int) - data[5][0]).mean() < 3  # quality 90, chroma halved
    assert reader.sizes.tolist() == [[10 + i, 16] for i in range(6)]


def test_any_truncation_is_one_clear_line(tmp_path):
    write_small(tmp_path / "x.beton")
    whole = (tmp_path / "x.beton").read_bytes()
    cut = tmp_path / "cut.beton"
    for num_bytes in (24, 1000, 2200, PAGE_BYTES - 5, PAGE_BYTES + 300, len(whole) - 24, len(whole) - 1):
        cut.write_bytes(whole[:num_bytes])
        with pytest.raises(DataError, match=r"^.*cut\.beton: truncated or damaged.*$"):
            BetonReader(cut)


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other.beton"
    with pytest.raises(DataError, match="no such file"):
        BetonReader(other)
    for content in (b"", b"hello", b"\x89PNG" + bytes(5000), np.random.default_rng(0).bytes(100_000)):
        other.write_bytes(content)
        with pytest.raises(DataError, match=r"not a \.beton file") as caught:
            BetonReader(other)
        assert "\n" not in str(caught.value)
    write_small(tmp_path / "x.beton")
    content = bytearray((tmp_path / "x.beton").read_bytes())
    content[HEADER.itemsize] = 5  # a JSON field in the place of the image
    other.write_bytes(content)
    with pytest.raises(DataError, match="needs one RGB image field"):
        BetonReader(other)
    content[: HEADER.itemsize] = np.array((2, 2, PAGE_BYTES, 0, PAGE_BYTES), HEADER).tobytes()
    content[HEADER.itemsize] = 2
    other.write_bytes(content)
    with pytest.raises(DataError, match="holds no images"):
        BetonReader(other)


@pytest.mark.parametrize(
    "name",
    [b"\xff\xfe", "é".encode(), b"la\0bel", b"", b"line\nbreak", b"image"],
    ids=["utf8", "é", "nul", "", "line", "twice"],
)
def test_a_damaged_field_name_is_one_clear_line(tmp_path, name):
    write_small(tmp_path / "x.beton")
    content = bytearray((tmp_path / "x.beton").read_bytes())
    start = HEADER.itemsize + FIELD.itemsize + FIELD.fields["name"][1]
    content[start : start + 16] = name.ljust(16, b"\0")
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(
        DataError, match=r"x\.beton: (a field has the name b|two fields have one name).*again"
    ) as caught:
        BetonReader(tmp_path / "x.beton")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [1 << 62, -5, -(1 << 63), 3_000_000, MAX_LABEL + 1])
def test_a_label_out_of_range_is_one_clear_line(tmp_path, label):
    write_small(tmp_path / "x.beton")
    path = tmp_path / "x.beton"
    metadata = np.memmap(path, METADATA, "r+", offset=HEADER.itemsize + 2 * FIELD.itemsize, shape=5)
    metadata["f1"][2:] = label, MAX_LABEL, -1
    metadata.flush()
    with pytest.raises(
        DataError, match=rf"x\.beton: image 2 has label {label}; labels are 0\.\.999999, or -1 for none"
    ):
        BetonReader(path)
    metadata["f1"][2] = 0
    metadata.flush()
    assert BetonReader(path).labels.tolist() == [0, 1, 0, MAX_LABEL, -1]


def test_identity_is_that_of_the_content(tmp_path):
    path, copy = tmp_path / "x.beton", tmp_path / "copy.beton"
    write_small(path, num=200)
    content = path.read_bytes()
    copy.write_bytes(content)
    identity = BetonReader(path).identity
    assert identity[:2] == [200, len(content)]
    assert BetonReader(copy).identity == identity
    reader = BetonReader(path)
    label = HEADER.itemsize + 2 * FIELD.itemsize + 130 * METADATA.itemsize + METADATA.fields["f1"][1]
    middle = int(reader.data_ptr[199] + reader.data_bytes[199] // 2)
    type_argument = HEADER.itemsize + FIELD.itemsize - 1
    jpeg = int(np.flatnonzero(reader.modes == JPG)[0])
    size = len(content) - (200 - jpeg) * ALLOCATION.itemsize + ALLOCATION.fields["size"][1]
    for place, differs in (
        (label, "other labels"),
        (type_argument, "other labels"),
        (size, "other labels"),
        (middle, "but other images"),
    ):
        other = bytearray(content)
        other[place] ^= 1
        copy.write_bytes(other)
        assert differs in str(difference(BetonReader(copy).identity, identity))
    assert difference(identity, identity) is None
    assert difference(identity, [200, len(content)]) is None


def test_identity_reads_little_of_a_large_file(tmp_path):
    """The tables, and 64 blocks of 4 KiB."""
    path = tmp_path / "x.beton"
    with BetonWriter(path) as writer:
        for i in range(300):
            writer.write_raw(np.full((100, 100, 3), i % 251, np.uint8))
    reader, num_read = BetonReader(path), []
    read = reader.read
    reader.read = lambda dtype, start, num: num_read.append(num * dtype.itemsize) or read(dtype, start, num)
    assert reader.identity[0] == 300
    tables = HEADER.itemsize + 2 * FIELD.itemsize + 300 * (METADATA.itemsize + ALLOCATION.itemsize)
    assert sum(num_read) == tables + 64 * 4096


def test_damaged_image_names_file_and_index(tmp_path):
    write_small(tmp_path / "x.beton")
    reader = BetonReader(tmp_path / "x.beton")
    start = int(reader.data_ptr[3])
    with (tmp_path / "x.beton").open("r+b") as file:
        file.seek(start)
        file.write(bytes(100))
    with pytest.raises(DataError, match=r"x\.beton: image 3 cannot be decoded"):
        BetonReader(tmp_path / "x.beton").decode(3)


def test_image_of_another_size_than_recorded(tmp_path):
    with BetonWriter(tmp_path / "x.beton") as writer:
        writer.write_jpeg(jpeg(picture(0, 8, 8)), height_px=9, width_px=8)
    with pytest.raises(DataError, match="image 0 is 8x8, not 9x8"):
        BetonReader(tmp_path / "x.beton").decode(0)


def test_sidecar_of_another_file(tmp_path):
    write_small(tmp_path / "x.beton", num=4)
    sidecar = tmp_path / "x.beton.json"
    sidecar.write_text(json.dumps({"num_images": 9}))
    with pytest.raises(DataError, match="belongs to another file"):
        BetonReader(tmp_path / "x.beton")
    sidecar.write_text("{")
    with pytest.raises(DataError, match="not a sidecar"):
        BetonReader(tmp_path / "x.beton")


def test_sidecar_and_inspect(tmp_path):
    path = tmp_path / "x.beton"
    write_small(path)
    sidecar = json.loads((tmp_path / "x.beton.json").read_text())
    rows = rows_path(path).read_bytes()
    assert (sidecar["rows_sha256"], sidecar["rows_crc32"]) == (hashlib.sha256(rows).hexdigest(), zlib.crc32(rows))
    assert sidecar["file_bytes"] == path.stat().st_size
    assert sidecar["source"] == "test"
    found = inspect(path)
    assert found["num_images"] == 5
    assert found["height_px"] == {"min": 8, "median": 10.0, "max": 12}
    assert found["modes"] == {"jpg": 2, "raw": 3}
    assert found["class_counts"] == {"even": 3, "odd": 2}
    assert found["image_bytes"] == BetonReader(path).data_bytes.sum()
    (tmp_path / "x.beton.json").unlink()
    assert inspect(path)["class_counts"] == {"0": 3, "1": 2}


def test_without_readable_hashes_all_else_works(tmp_path):
    path, hashes = tmp_path / "x.beton", tmp_path / "x.beton.hashes"
    with BetonWriter(path) as writer:
        writer.write_raw(picture(0, 4, 4), hashes=(1, 2))
    found = BetonReader(path).hashes
    assert found is not None
    assert found.tolist() == [[1, 2]]
    for replace in (hashes.mkdir, lambda: os.mkfifo(hashes), lambda: hashes.symlink_to(hashes)):
        hashes.rmdir() if hashes.is_dir() else hashes.unlink()
        replace()
        reader = BetonReader(path)
        assert reader.hashes is None
        assert reader.decode(0).shape == (4, 4, 3)


def test_exception_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with BetonWriter(tmp_path / "x.beton") as writer:
            writer.write_raw(picture(0, 4, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(DataError, match="no images"), BetonWriter(tmp_path / "x.beton"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_kept_without_overwrite(tmp_path):
    write_small(tmp_path / "x.beton")
    with pytest.raises(DataError, match="exists already"), BetonWriter(tmp_path / "x.beton"):
        pass
    with BetonWriter(tmp_path / "x.beton", overwrite=True) as writer:
        writer.write_raw(picture(0, 4, 4))
    assert BetonReader(tmp_path / "x.beton").num_samples == 1
    with pytest.raises(DataError, match="no such folder"), BetonWriter(tmp_path / "none" / "x.beton"):
        pass


def test_writer_checks_its_input(tmp_path):
    with BetonWriter(tmp_path / "x.beton") as writer:
        with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
            writer.write_raw(np.zeros((4, 4), np.uint8))
        with pytest.raises(ValueError, match="sides must be"):
            writer.write_jpeg(b"x", height_px=70_000, width_px=1)
        with pytest.raises(ValueError, match=r"label must be in -1\.\.999999, not 1000000"):
            writer.write_jpeg(b"x", height_px=1, width_px=1, label=MAX_LABEL + 1)
        with pytest.raises(ValueError, match="bytes"):
            writer.write_jpeg(b"", height_px=1, width_px=1)
        writer.write_raw(picture(0, 1, 1))


def test_hint_reserves_room(tmp_path, monkeypatch):
    with BetonWriter(tmp_path / "x.beton", 400_000) as writer:
        writer.write_raw(picture(0, 4, 4))
    assert BetonReader(tmp_path / "x.beton").data_ptr[0] == 2 * PAGE_BYTES
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    pixels = np.zeros((1, 1, 3), np.uint8)
    with BetonWriter(tmp_path / "y.beton") as writer:
        for _ in range((4096 - 24 - 2 * 1041) // 24):
            writer.write_raw(pixels)
        with pytest.raises(ValueError, match="larger num_samples_hint"):
            writer.write_raw(pixels)


def test_memory_does_not_grow_with_the_data(tmp_path):
    def peak_bytes(num: int) -> int:
        data = bytes(1 << 20)
        tracemalloc.start()
        with BetonWriter(tmp_path / f"{num}.beton") as writer:
            for _ in range(num):
                writer.write_jpeg(data, height_px=100, width_px=100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(96) - peak_bytes(4) < 1 << 20


def test_contact_sheet(tmp_path):
    images = [np.full((4, 8, 3), 40 * i, np.uint8) for i in range(5)]
    with BetonWriter(tmp_path / "x.beton", class_names=["a", "ein sehr langer Name von einer Klasse", "ü"]) as writer:
        for i, image in enumerate(images):
            writer.write_raw(image, label=i - 1)
    reader = BetonReader(tmp_path / "x.beton")
    contact_sheet(reader, tmp_path / "sheet.png", num_images=5, cell_px=40)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 56, 3 * 42, 3)
    assert sheet[20, [20, 62, 104], 0].tolist() == [0, 40, 80]  # in file order; the cell's centre
    contact_sheet(reader, tmp_path / "again.png", num_images=2, seed=3)
    with pytest.raises(ValueError, match="num_images"):
        contact_sheet(reader, tmp_path / "none.png", num_images=0)
