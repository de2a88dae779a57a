"""`verify` finds what a training would stumble over."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from pipelines.beton.format import FIELD, HEADER, METADATA
from pipelines.errors import DataError
from pipelines.shards.build import write_manifest
from pipelines.shards.rows import ROW
from pipelines.shards.store import LocalStore
from pipelines.verify import ShardsVerifyReport, verify, verify_any
from tests.helpers.fault_server import FaultServer
from tests.helpers.shards import picture, write_pictures


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(60, 200, (3, 3, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((70, 60), Image.Resampling.BILINEAR).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def beton(tmp_path) -> Path:
    with BetonWriter(tmp_path / "x.beton", 200) as writer:
        for k in range(200):
            if k % 4:
                writer.write_jpeg(jpeg(k), height_px=60, width_px=70)
            else:
                writer.write_raw(np.full((5, 6, 3), k, np.uint8))
    return tmp_path / "x.beton"


def damage(path: Path, i: int, at: int, content: bytes) -> None:
    start = int(BetonReader(path).data_ptr[i])
    with path.open("r+b") as file:
        file.seek(start + at)
        file.write(content)


def drop_sidecar(path: Path) -> None:
    Path(f"{path}.json").unlink()


def test_a_whole_file(beton):
    found = verify(beton)
    assert (found.num_images, found.num_jpeg, found.num_raw) == (200, 150, 50)
    assert found.digest == json.loads(Path(f"{beton}.json").read_text())["rows_sha256"]
    assert found.digest == hashlib.sha256(Path(f"{beton}.rows").read_bytes()).hexdigest()
    assert f"{beton}: whole; 200 images (150 JPEG, 50 raw)" in str(found)
    drop_sidecar(beton)
    assert verify(beton).digest is None
    assert "no sidecar" in str(verify(beton))


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_changed_pixel_fails_the_checksum_alone(beton, has_rows):
    """Without its rows file, whose checksum the sidecar holds, a file is compared too, but no image can be named."""
    damage(beton, 4, 10, b"x")
    named = r"1 of 200 images are bad: 4 \(has another checksum than its rows file says\); "
    if not has_rows:
        Path(f"{beton}.rows").unlink()
    with pytest.raises(
        DataError, match=rf"x\.beton: {named if has_rows else ''}its checksum is not the sidecar's; copy"
    ):
        verify(beton)


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_changed_label_fails(beton, has_rows):
    assert BetonReader(beton).labels[7] == -1
    assert METADATA.fields is not None
    label_at = METADATA.fields["f1"][1]
    with beton.open("r+b") as file:
        file.seek(HEADER.itemsize + 2 * FIELD.itemsize + 7 * METADATA.itemsize + label_at)
        file.write((3).to_bytes(8, "little"))
    assert BetonReader(beton).labels[7] == 3
    if not has_rows:
        Path(f"{beton}.rows").unlink()
    with pytest.raises(DataError, match="its checksum is not the sidecar's"):
        verify(beton)


def test_a_file_of_an_older_version_has_a_checksum_of_the_whole(beton):
    sidecar = Path(f"{beton}.json")
    found = json.loads(sidecar.read_text())
    del found["rows_sha256"]
    found["sha256"] = hashlib.sha256(beton.read_bytes()).hexdigest()
    sidecar.write_text(json.dumps(found))
    assert verify(beton).digest == found["sha256"]
    damage(beton, 4, 10, b"x")
    with pytest.raises(DataError, match=r"x\.beton: its checksum is not the sidecar's; copy it again"):
        verify(beton)


def test_bad_images_are_counted_and_the_first_are_named(beton):
    drop_sidecar(beton)
    for i in (1, 50, 102, 103, 105, 197):
        damage(beton, i, 0, bytes(30))
    damage(beton, 199, len(jpeg(199)) - 40, bytes(38))  # the header is whole, the image is not
    with pytest.raises(DataError, match="7 of 200 images are bad") as caught:
        verify(beton, num_threads=2)
    assert all(f" {i} (" in str(caught.value) for i in (1, 50, 102, 103, 105))
    assert str(caught.value).endswith("and 2 more; copy it again or convert again")
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_than_recorded(tmp_path):
    with BetonWriter(tmp_path / "x.beton") as writer:
        writer.write_jpeg(jpeg(0), height_px=61, width_px=70)
    with pytest.raises(DataError, match=r"1 of 1 images are bad: 0 \(damaged JPEG \(not 61x70 as recorded\)\)"):
        verify(tmp_path / "x.beton")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path / "set")
    return tmp_path / "set"


SECOND = "x-00001-of-00003.beton"


def test_a_whole_data_set(folder):
    for place in (str(folder), f"{folder}/dataset.json", f"{folder}/*.beton"):
        found = verify_any(place)
        assert isinstance(found, ShardsVerifyReport)
        assert (found.num_shards, found.num_images, found.num_jpeg, found.num_raw) == (3, 24, 24, 0)
        assert found.file_bytes == sum(path.stat().st_size for path in folder.glob("*.beton"))
        assert "whole; 3 shards, 24 images (24 JPEG, 0 raw)" in str(found)


def test_one_changed_byte_of_a_shard_is_found_where_the_image_still_decodes(folder):
    reader = BetonReader(folder / SECOND)
    start, size = int(reader.data_ptr[5]), int(reader.data_bytes[5])
    with (folder / SECOND).open("r+b") as file:
        file.seek(start + size - 1)
        file.write(b"\xd8")  # of the marker at the end
    with pytest.raises(DataError, match=f"1 of 24 images are bad: {SECOND} 5 \\(has another checksum") as caught:
        verify_any(str(folder))
    assert "\n" not in str(caught.value)


def test_images_that_were_written_damaged_have_the_right_checksum_but_do_not_decode(folder):
    with BetonWriter(folder / SECOND, class_names=["cat", "dog"], overwrite=True) as writer:
        for k in range(8):
            writer.write_jpeg(picture(k + 8, 40)[: 400 if k == 2 else None], height_px=40, width_px=44, label=0)
    write_manifest(LocalStore(folder))
    with pytest.raises(DataError, match=f"1 of 24 images are bad: {SECOND} 2 \\((?!has another checksum)"):
        verify_any(str(folder))


def test_shards_that_are_not_those_of_the_manifest(folder):
    (folder / "x-00002-of-00003.beton").rename(folder / "old")
    with pytest.raises(DataError, match=r"x-00002-of-00003\.beton is missing"):
        verify_any(str(folder))


def test_a_remote_data_set(folder):
    with FaultServer(folder) as server:
        server.always("", "405")  # no list
        server.plan(SECOND, "ok", "cut", "500")
        assert verify_any(server.url).num_images == 24
        rows = np.fromfile(folder / f"{SECOND}.rows", ROW)
        with (folder / SECOND).open("r+b") as file:
            file.seek(int(rows["ptr"][3]) + 400)
            file.write(bytes(2))
        with pytest.raises(DataError, match=f"1 of 24 images are bad: {SECOND} 3 \\(has another checksum"):
            verify_any(server.url)
