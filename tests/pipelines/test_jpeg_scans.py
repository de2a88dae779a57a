"""JPEGs with thousands of scans: small files that would take hours."""

import io
import time
from pathlib import Path

import pytest
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from pipelines.convert.images import CorruptImageError, read_upright, store_file
from pipelines.errors import DataError
from pipelines.jpeg_scans import MAX_SCANS, has_too_many_scans

NUM_SCANS = 200_000  # 3000x3000 pixels: 25 ms each


def jpeg(mode: str, num_again: int = 0, side_px: int = 70) -> bytes:
    """A progressive JPEG whose last scan occurs more often."""
    file = io.BytesIO()
    Image.new(mode, (side_px, side_px)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * num_again + data[-2:]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_usual_ones_are_few(mode: str) -> None:
    assert not has_too_many_scans(jpeg(mode))
    assert not has_too_many_scans(jpeg(mode, MAX_SCANS - 20))
    assert has_too_many_scans(jpeg(mode, MAX_SCANS + 1))
    assert not has_too_many_scans(jpeg(mode) + b"\xff\xda" * 1000)  # after its end
    assert not has_too_many_scans(b"\xff\xd8" + b"\xff\xe1\x10\x00" + b"\xff\xda" * 2047)  # within a segment


@pytest.mark.parametrize("mode", ["L", "CMYK"])  # read by TurboJPEG and by Pillow
def test_more_are_refused_in_time(mode: str) -> None:
    hours = jpeg(mode, NUM_SCANS, side_px=3000)
    start_s = time.monotonic()
    for read in (read_upright, lambda data: store_file(data, max_px=None, quality=90)):
        with pytest.raises(CorruptImageError, match="a JPEG of more than 100 scans"):
            read(hours)
    assert time.monotonic() - start_s < 10


def test_one_in_a_file_is_not_decoded(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "x.beton", 1) as writer:
        writer.write_jpeg(jpeg("L", NUM_SCANS), height_px=70, width_px=70)
    with pytest.raises(DataError, match=r"image 0 cannot be decoded .more than 100 scans"):
        BetonReader(tmp_path / "x.beton").decode(0)
