"""`verify` finds what a training would stumble over."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from pipelines.errors import DataError
from pipelines.verify import verify


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
    assert found.sha256 == json.loads(Path(f"{beton}.json").read_text())["sha256"]
    assert f"{beton}: whole; 200 images (150 JPEG, 50 raw)" in str(found)
    drop_sidecar(beton)
    assert verify(beton).sha256 is None
    assert "no sidecar" in str(verify(beton))


def test_a_changed_pixel_fails_the_checksum_alone(beton):
    damage(beton, 4, 10, b"x")
    with pytest.raises(DataError, match=r"x\.beton: its sha256 is not the sidecar's; copy it again"):
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
