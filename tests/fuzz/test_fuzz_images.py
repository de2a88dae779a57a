"""Damaged image files of every format, under the names of others."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.convert.images import FORMATS
from tests.helpers.fuzz import cases, mutate_bytes, num_cases
from tests.helpers.fuzz_convert import convert_or_refuse

pytestmark = pytest.mark.timeout(300 + num_cases() // 2)

NUM_FILES = 3  # of a case
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16")
# Formats that Pillow knows and that are not read, some of which start other programs.
OTHERS = (
    *(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", b"8BPS\0\1" + bytes(60)),
    *(b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a" + bytes(80), b"\x80\xe8\0\0" + bytes(40), b"#define x_width 8\n"),
)
HUGE_PX = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def encoded(rng: np.random.Generator) -> bytes:
    pixels = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
    while True:
        file = io.BytesIO()
        try:
            image = pixels.convert(MODES[int(rng.integers(len(MODES)))])
            image.save(file, FORMATS[int(rng.integers(len(FORMATS)))], progressive=bool(rng.integers(2)))  # if a JPEG
        except (OSError, ValueError):  # a mode that the format does not have
            continue
        return file.getvalue()


def with_odd_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite 2 or 4 bytes near the start, where the sizes are."""
    at, width = int(rng.integers(min(len(data), 60))), int(rng.choice([2, 4]))
    value = HUGE_PX[int(rng.integers(len(HUGE_PX)))] % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, ("big", "little")[int(rng.integers(2))]) + data[at + width :]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*:PIL.Image.DecompressionBombWarning")
def test_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for case in cases("images", fraction=1):
        rng = case.rng
        for k in range(NUM_FILES):
            data = encoded(rng) if rng.integers(8) else OTHERS[int(rng.integers(len(OTHERS)))]
            change = (mutate_bytes, with_odd_number, lambda data, _: data)[int(rng.integers(3))]
            (folder / f"{k}.{('jpg', 'png', 'gif')[k % 3]}").write_bytes(change(data, rng))
        convert_or_refuse(case, "folder", folder, max_px=int(rng.choice([8, 64])))
