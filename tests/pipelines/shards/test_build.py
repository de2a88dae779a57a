"""`write_manifest` and `check_manifest` on whole, incomplete, mixed and damaged data sets."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.beton import BetonReader, BetonWriter
from pipelines.beton.format import ALLOCATION, FIELD, HEADER, METADATA
from pipelines.errors import DataError
from pipelines.shards.build import RANGE_BYTES, check_manifest, write_manifest
from pipelines.shards.manifest import Manifest
from pipelines.shards.rows import ROW, is_intact, rows_path
from pipelines.shards.store import LocalStore
from tests.helpers.shards import NUM_IMAGES, CountingStore, contents, write_shard, write_shards

CLASSES = ["cat", "dog", "fox", "owl"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the images begin after 4 KiB instead of 8 MiB of zeros."""
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_shards(tmp_path / "set", class_names=CLASSES)
    return tmp_path / "set"


def manifest_of(folder: Path) -> Manifest:
    return Manifest.from_json((folder / "dataset.json").read_bytes(), "dataset.json")


def refused(folder: Path, **options: bool) -> str:
    """The line that refuses a data set; nothing is written."""
    before = contents(folder)
    with pytest.raises(DataError) as caught:
        write_manifest(LocalStore(folder), **options)
    assert contents(folder) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


def mismatch(folder: Path, **options: bool) -> str:
    """The line that says how a data set differs from its manifest; nothing is written."""
    before = contents(folder)
    with pytest.raises(DataError) as caught:
        check_manifest(LocalStore(folder), **options)
    assert contents(folder) == before
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def middle_of_image(path: Path, i: int) -> int:
    reader = BetonReader(path)
    return int(reader.data_ptr[i] + reader.data_bytes[i] // 2)


def test_a_manifest_describes_its_shards(folder):
    (folder / ".hidden.beton").write_bytes(b"x")
    (folder / "deeper").mkdir()
    write_shard(folder / "deeper" / "y.beton", 9)
    report = write_manifest(LocalStore(folder))
    found = manifest_of(folder)
    names = [f"x-0000{k}-of-00003.beton" for k in range(3)]
    assert [shard.name for shard in found.shards] == names
    assert found.class_names == CLASSES
    assert found.label_counts == [6, 6, 3, 0]
    for shard in found.shards:
        reader = BetonReader(folder / shard.name)
        assert (shard.num_images, shard.num_bytes, shard.num_raw) == (6, len(reader.mmap), 3)
        assert shard.image_bytes == reader.data_bytes.sum()
        assert (shard.etag, shard.one_size_px) == (None, None)
    assert (report.num_images, report.num_raw, report.num_classes) == (18, 9, 4)
    assert (report.digest, report.num_rows_written, report.num_images_read) == (found.digest, 0, 0)
    assert check_manifest(LocalStore(folder)) == report


def test_writing_again_changes_nothing(folder, tmp_path):
    write_manifest(LocalStore(folder))
    before = contents(folder)
    write_manifest(LocalStore(folder), verify=True, num_threads=3)
    assert contents(folder) == before
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("*.rows"):
        path.unlink()
    (copy / "dataset.json").unlink()
    assert write_manifest(LocalStore(copy)).num_rows_written == 3
    assert contents(copy) == before


def test_one_size(tmp_path):
    with BetonWriter(tmp_path / "a.beton") as writer:
        for k in range(3):
            writer.write_raw(np.full((5, 7, 3), k, np.uint8))
    write_manifest(LocalStore(tmp_path))
    assert manifest_of(tmp_path).one_size_px == (5, 7)


def test_samples_in_another_order_than_their_images(tmp_path):
    write_shard(path := tmp_path / "a.beton", 1)
    images = [BetonReader(path).image_bytes(i).tobytes() for i in (3, 1, 2, 0, 4, 5)]
    for name in ("a.beton.json", "a.beton.rows"):
        (tmp_path / name).unlink()
    records = np.memmap(path, METADATA, "r+", offset=HEADER.itemsize + 2 * FIELD.itemsize, shape=NUM_IMAGES)
    table = np.memmap(path, ALLOCATION, "r+", offset=BetonReader(path).alloc_table_start, shape=NUM_IMAGES)
    records[[0, 3]] = records[[3, 0]]
    table["sample_id"][[0, 3]] = 3, 0
    table[:] = table[::-1].copy()
    records.flush()
    table.flush()
    write_manifest(LocalStore(tmp_path))
    rows = np.frombuffer(rows_path(path).read_bytes(), ROW)
    assert (np.diff(rows["ptr"].astype(np.int64)) < 0).any()
    assert all(is_intact(rows[i : i + 1].data, images[i]) for i in range(NUM_IMAGES))


@pytest.mark.slow
def test_shards_of_stock_ffcv_get_rows(tmp_path):
    """Its workers write their images and table entries one after another's, not in the order of the samples."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    data = [(np.random.default_rng(k).integers(0, 256, (10 + k, 16, 3), np.uint8), k) for k in range(40)]
    path = tmp_path / "stock.beton"
    fields = {"image": RGBImageField(write_mode="smart", smart_threshold=16 * 30 * 3), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(data, chunksize=3, shuffle_indices=True)
    report = write_manifest(LocalStore(tmp_path))
    assert (report.num_rows_written, report.num_images_read, report.num_classes) == (1, 40, None)
    reader, rows = BetonReader(path), np.frombuffer(rows_path(path).read_bytes(), ROW)
    assert rows["ptr"].tolist() == reader.data_ptr.tolist()
    assert write_manifest(LocalStore(tmp_path), verify=True).num_rows_written == 0
    flip(path, middle_of_image(path, 25))
    assert "stock.beton: 1 of 40 images do not match their checksums in the rows file: 25; copy" in refused(
        tmp_path, verify=True
    )


def test_ranges_of_a_store_without_memory_map(tmp_path, monkeypatch):
    """Every image is read once, in ranges of a limited size; a larger image in several."""
    monkeypatch.setattr("pipelines.shards.build.RANGE_BYTES", 1200)
    folder = tmp_path / "set"
    write_shards(folder)
    with BetonWriter(folder / "y.beton") as writer:
        writer.write_jpeg(bytes(range(250)) * 20, height_px=4, width_px=4)  # of 5,000 bytes
        writer.write_jpeg(b"x", height_px=4, width_px=4)
    expected = contents(folder)
    for path in folder.glob("*.rows"):
        path.unlink()
    store = CountingStore(folder)
    write_manifest(store, num_threads=4)
    assert {name: content for name, content in contents(folder).items() if name != "dataset.json"} == expected
    assert store.puts[-1] == "dataset.json"
    assert sorted(store.puts[:-1]) == [f"x-0000{k}-of-00003.beton.rows" for k in range(3)] + ["y.beton.rows"]
    assert max(stop - start for _, start, stop in store.ranges) <= 1200
    for path in folder.glob("*.beton"):
        reader = BetonReader(path)
        ranges = [(start, stop) for name, start, stop in store.ranges if name == path.name]
        first, end = int(reader.data_ptr[0]), int(reader.data_ptr[-1] + reader.data_bytes[-1])
        read = sum(max(0, min(stop, end) - max(start, first)) for start, stop in ranges)
        assert int(reader.data_bytes.sum()) <= read <= end - first
    assert manifest_of(folder).shards[0].etag == '"x-00000-of-00003.beton"'
    store.ranges.clear()
    check_manifest(store)
    assert all(stop <= 4096 or start >= 4096 for _, start, stop in store.ranges)  # tables only
    assert RANGE_BYTES == 8 << 20


def test_a_replaced_object_is_found(folder, monkeypatch):
    write_manifest(CountingStore(folder))
    old = CountingStore.list
    monkeypatch.setattr(CountingStore, "list", lambda store: [replace(info, etag='"new"') for info in old(store)])
    monkeypatch.setattr(CountingStore, "get", LocalStore.get)
    with pytest.raises(DataError, match=r"x-00000-of-00003\.beton was replaced, x-00001"):
        check_manifest(CountingStore(folder))


@pytest.mark.parametrize("num_missing", [1, 2, 7])
def test_missing_shards_are_listed(tmp_path, num_missing):
    paths = write_shards(tmp_path, num=8)
    for path in paths[:num_missing]:
        path.unlink()
    listed = ", ".join(path.name for path in paths[: min(num_missing, 5)]) + " and 2 more" * (num_missing == 7)
    assert refused(tmp_path) == f"{tmp_path}: shards are missing: {listed}; convert or copy them first"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x-00003-of-00003.beton", "its number must be less than 3"),
        ("x-1-of-3.beton", r"the same shard as x-00001-of-00003.beton"),
        ("x-00000-of-00004.beton", "shards of several conversions: x-00000-of-00003.beton, x-00000-of-00004.beton"),
        ("y-00000-of-999999999.beton", "y-00001-of-999999999.beton, y-00002-of-999999999.beton"),
        ("\x1b[2J-0-of-2.beton", "shards are missing: \\x1b[2J-00001-of-00002.beton"),
        ("\udcff.beton", "cannot be a shard: it is not UTF-8"),
    ],
)
def test_names_that_make_no_data_set(folder, name, reason):
    shutil.copy(folder / "x-00001-of-00003.beton", folder / name)
    assert reason in refused(folder)


def test_series_and_single_files_together(folder):
    write_shard(folder / "a.beton", 7, CLASSES)
    write_shard(folder / "y-0-of-1.beton", 8, CLASSES)
    assert write_manifest(LocalStore(folder)).num_shards == 5
    assert [shard.name for shard in manifest_of(folder).shards][::4] == ["a.beton", "y-0-of-1.beton"]


def test_no_shards(tmp_path):
    assert "no .beton files; `fastssl convert` writes them" in refused(tmp_path)


def test_the_same_images_twice(folder):
    shutil.copy(folder / "x-00001-of-00003.beton", folder / "y.beton")
    for suffix in (".json", ".rows"):
        shutil.copy(folder / f"x-00001-of-00003.beton{suffix}", folder / f"y.beton{suffix}")
    assert "y.beton: holds the same images as x-00001-of-00003.beton; remove one of them" in refused(folder)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["cat", "dog", "elk", "owl"], "class 2 is 'fox' and 'elk'"),
        (CLASSES[:3], "4 and 3 classes"),
        (None, "the second has no names"),
        ("no sidecar", "the second has no names"),
    ],
)
def test_other_class_names(folder, names, reason):
    write_shard(folder / "y.beton", 7, CLASSES if names == "no sidecar" else names)
    if names == "no sidecar":
        (folder / "y.beton.json").unlink()
    assert f"x-00000-of-00003.beton and y.beton have other class names ({reason}" in refused(folder)


def test_a_sidecar_of_another_file(folder):
    sidecar = folder / "x-00001-of-00003.beton.json"
    found = json.loads(sidecar.read_text())
    for key in ("num_images", "file_bytes"):
        sidecar.write_text(json.dumps(found | {key: found[key] + 1}))
        assert "x-00001-of-00003.beton.json: belongs to another file" in refused(folder)
    sidecar.write_text("{")
    assert "x-00001-of-00003.beton.json: not a sidecar" in refused(folder)


@pytest.mark.parametrize("num_left", [0, 10, 1000, 4500, -24, -1])
def test_truncated_shards(folder, num_left):
    path = folder / "x-00001-of-00003.beton"
    path.write_bytes(path.read_bytes()[:num_left])
    assert f"{path}: " in (line := refused(folder))
    assert "again" in line


def test_a_link_to_nothing_is_not_overlooked(folder):
    (folder / "y.beton").symlink_to(folder / "gone")
    before = (folder / "y.beton").is_symlink()
    with pytest.raises(DataError, match=r"y\.beton: not a \.beton file|other class names"):
        write_manifest(LocalStore(folder))
    assert before


@pytest.mark.parametrize("has_sidecar", [True, False])
def test_rows_of_another_file_are_written_again(folder, has_sidecar):
    write_manifest(LocalStore(folder))
    paths = sorted(folder.glob("*.beton"))
    if not has_sidecar:
        for path in paths:
            Path(f"{path}.json").unlink()
        write_manifest(LocalStore(folder))
    before = contents(folder)
    write_shard(folder / "other.beton", 99, num=NUM_IMAGES + 1)
    others = [rows_path(folder / "other.beton").read_bytes(), rows_path(paths[0]).read_bytes(), b"", b"x"]
    for name in ("other.beton", "other.beton.json", "other.beton.rows"):
        (folder / name).unlink()
    if has_sidecar:  # whose checksum tells the same places in another file apart
        others.append(rows_path(paths[1]).read_bytes()[:-4] + b"abcd")
    for other in others:
        if other == rows_path(paths[0]).read_bytes() and not has_sidecar:
            continue  # as many images, of the same sizes
        rows_path(paths[1]).write_bytes(other)
        assert "x-00001-of-00003.beton.rows: missing, or of another file" in mismatch(folder)
        assert write_manifest(LocalStore(folder)).num_rows_written == 1
        assert contents(folder) == before


def test_images_that_changed_since_the_conversion(folder):
    path = folder / "x-00001-of-00003.beton"
    write_manifest(LocalStore(folder))
    flip(path, middle_of_image(path, 4))
    assert check_manifest(LocalStore(folder)).num_images_read == 0
    assert "1 of 6 images do not match their checksums in the rows file: 4;" in mismatch(folder, verify=True)
    assert "1 of 6 images do not match their checksums in the rows file: 4;" in refused(folder, verify=True)
    rows_path(path).unlink()
    assert "x-00001-of-00003.beton: its images changed since the conversion; copy it again" in refused(folder)


def test_changed_shards_are_found(folder):
    write_manifest(LocalStore(folder))
    paths = sorted(folder.glob("*.beton"))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    write_shard(paths[0], 50, CLASSES, num=7)
    write_shard(folder / "new.beton", 51, CLASSES)
    paths[2].unlink()
    line = mismatch(folder)
    assert "x-00002-of-00003.beton is missing, new.beton is not in it, x-00000-of-00003.beton has" in line
    assert line.endswith("; copy them again, or write the manifest again with `fastssl manifest`")
    for path in folder.iterdir():
        path.unlink()
    for path, content in whole.items():
        path.write_bytes(content)
    check_manifest(LocalStore(folder), verify=True)
    write_shard(paths[0], 50, CLASSES)  # of the same size
    assert "does not match the files: x-00000-of-00003.beton holds other images or labels; copy" in mismatch(folder)
    write_manifest(LocalStore(folder))
    check_manifest(LocalStore(folder), verify=True)


def test_changed_class_names_are_found(folder):
    write_manifest(LocalStore(folder))
    for path in folder.glob("*.beton.json"):
        path.write_text(path.read_text().replace("cat", "bat"))
    assert "does not match the class names or labels of the shards" in mismatch(folder)


def test_a_manifest_that_is_none(folder):
    assert "dataset.json: no such file; write it with `fastssl manifest`" in mismatch(folder)
    (folder / "dataset.json").write_bytes(b"{}")
    assert "dataset.json: not a manifest" in mismatch(folder)


def test_images_that_no_rows_can_describe(folder, monkeypatch):
    monkeypatch.setattr("pipelines.shards.build.MAX_IMAGE_BYTES", 504)
    assert "image 5 takes 505 bytes, and those of a shard at most 504; convert it again" in refused(folder)


def test_two_images_in_one_place(tmp_path):
    """Or a small file could ask for terabytes of reading."""
    with BetonWriter(tmp_path / "a.beton") as writer:
        for k in range(3):
            writer.write_jpeg(bytes([k]) * 100, height_px=4, width_px=4)
    path = tmp_path / "a.beton"
    for name in ("a.beton.json", "a.beton.rows"):
        (tmp_path / name).unlink()
    first = int(BetonReader(path).data_ptr[0])
    content = path.read_bytes().replace((first + 100).to_bytes(8, "little"), (first + 1).to_bytes(8, "little"))
    path.write_bytes(content)
    assert BetonReader(path).data_ptr.tolist() == [first, first + 1, first + 200]
    assert "a.beton: truncated or damaged" in refused(tmp_path)


def test_a_file_that_cannot_be_written(folder):
    (folder / "x-00001-of-00003.beton.rows").unlink()
    (folder / "x-00001-of-00003.beton.rows").mkdir()
    before = sorted(os.listdir(folder))
    with pytest.raises(DataError, match=r"x-00001-of-00003\.beton\.rows: cannot be written"):
        write_manifest(LocalStore(folder))
    assert sorted(os.listdir(folder)) == before


def test_an_error_ends_the_other_threads_soon(folder, monkeypatch):
    """One that fails in the middle of a large data set does not wait until all is read."""
    for path in folder.glob("*.rows"):
        path.unlink()
    monkeypatch.setattr("pipelines.shards.build.RANGE_BYTES", 600)

    class Failing(CountingStore):
        def get(self, path: str, start: int, stop: int, etag: str | None = None) -> bytes:
            if len(self.ranges) == 8 + 1:
                raise DataError("the network is gone")
            return super().get(path, start, stop, etag)

    store = Failing(folder)
    with pytest.raises(DataError, match="the network is gone"):
        write_manifest(store, num_threads=1)
    assert len(store.ranges) == 9
    assert "dataset.json" not in store.puts
