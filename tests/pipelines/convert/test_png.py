"""Plain PNGs are decoded to Pillow's pixels; what is not plain, or not whole, is left to Pillow."""

import io
import random
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from pipelines.convert.images import CorruptImageError, read_upright, store_file
from pipelines.convert.png import decode_png, png_size

SIDES = [(1, 1), (1, 9), (7, 1), (13, 22), (64, 65)]  # (height, width) in px
RNG = np.random.default_rng(3)


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def picture(height_px: int, width_px: int, mode: str = "RGB") -> Image.Image:
    rows, columns = np.mgrid[:height_px, :width_px]
    levels = np.stack([rows * 3 + columns, columns * 5 - rows, rows * columns], 2) + RNG.integers(
        0, 9, (height_px, width_px, 3)
    )
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def by_filter(pixels: np.ndarray, kind: int) -> bytes:
    """A PNG all of whose rows have this filter, with two chunks of data."""
    height_px, width_px, num_channels = pixels.shape
    rows = pixels.reshape(height_px, -1).astype(int)
    left = np.pad(rows, ((0, 0), (num_channels, 0)))[:, : rows.shape[1]]
    up = np.pad(rows, ((1, 0), (0, 0)))[:height_px]
    corner = np.pad(left, ((1, 0), (0, 0)))[:height_px]
    far = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner]))
    paeth = np.choose(far.argmin(0), [left, up, corner])  # the first of equals, as the standard wants
    predicted = [np.zeros_like(rows), left, up, (left + up) // 2, paeth, left][kind]
    filtered = np.concatenate([np.full((height_px, 1), kind), (rows - predicted) % 256], 1).astype(np.uint8)
    data = zlib.compress(filtered.tobytes())
    head = width_px.to_bytes(4, "big") + height_px.to_bytes(4, "big") + bytes([8, {1: 0, 3: 2}[num_channels], 0, 0, 0])
    parts = chunk(b"IHDR", head), chunk(b"IDAT", data[:7]), chunk(b"IDAT", data[7:]), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def decoded(data: bytes) -> np.ndarray | None:
    size = png_size(data)
    return None if size is None else decode_png(data, *size)


def pixels_of(data: bytes) -> np.ndarray:
    found = decoded(data)
    assert found is not None
    return found


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("sides", SIDES)
def test_pixels_are_pillows(sides, mode):
    data = encoded(picture(sides[0], sides[1], mode))
    assert np.array_equal(pixels_of(data), by_pillow(data))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", range(5))
def test_each_filter(kind, mode):
    pixels = RNG.integers(0, 256, (17, 23, len(mode)), np.uint8)
    pixels[5:9] = pixels[4]  # ties between the neighbours
    data = by_filter(pixels, kind)
    expected = np.broadcast_to(pixels, (17, 23, 3))
    assert np.array_equal(by_pillow(data), expected)
    assert np.array_equal(pixels_of(data), expected)


def with_text(keyword: str, text: str) -> bytes:
    info = PngInfo()
    info.add_text(keyword, text)
    return encoded(picture(9, 8), pnginfo=info)


def test_texts_resolution_and_colour_profile_do_not_matter():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = {"dpi": (72, 72)}, {"icc_profile": profile}
    for data in (with_text("Software", "x"), *(encoded(picture(9, 8), **options) for options in plain)):
        assert np.array_equal(pixels_of(data), by_pillow(data))


def palette_with_transparency() -> bytes:
    return encoded(picture(9, 8).convert("P"), transparency=3)


EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = '<x tiff:Orientation="6"/>'


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(9, 8, "RGBA")),
        encoded(picture(9, 8, "LA")),
        encoded(picture(9, 8, "P")),
        encoded(picture(9, 8, "1")),
        encoded(Image.fromarray(np.arange(72, dtype=np.uint16).reshape(9, 8))),
        encoded(picture(9, 8), transparency=(1, 2, 3)),
        encoded(picture(9, 8), exif=EXIF),
        with_text("XML:com.adobe.xmp", XMP),
        with_text("Raw profile type exif", XMP),
        with_text("Comment", "x" * 100_000),
        by_filter(np.zeros((4, 5, 3), np.uint8), 5),
        b"",
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=["RGBA", "LA", "P", "1", "16", "tRNS", "eXIf", "XMP", "raw profile", "long text", "filter 5", "empty", "short"],
)
def test_what_is_not_plain_is_left_to_pillow(data):
    assert decoded(data) is None


def test_a_turned_png_is_still_turned():
    assert read_upright(encoded(picture(9, 8), exif=EXIF)).shape == (8, 9, 3)
    assert read_upright(encoded(picture(9, 8))).shape == (9, 8, 3)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_damaged_files_are_never_taken_for_whole(mode):
    """Whatever is changed: either nobody sees another pixel, or Pillow gets the file."""
    rng = random.Random(5)
    whole = [encoded(picture(11, 14, mode)), by_filter(np.asarray(picture(6, 7, mode)).reshape(6, 7, len(mode)), 4)]
    num_taken = 0
    for i in range(3000):
        data = bytearray(whole[i % 2])
        match i % 4:
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[rng.randrange(8, len(data)) :]
            case 2:
                at = rng.randrange(len(data))
                data[at:at] = rng.randbytes(rng.randrange(1, 5))
            case _:
                at = rng.randrange(len(data))
                del data[at : at + rng.randrange(1, 5)]
        found = decoded(bytes(data))
        if found is not None:
            num_taken += 1
            assert np.array_equal(found, by_pillow(bytes(data)))
            assert np.array_equal(found, by_pillow(whole[i % 2]))
    assert num_taken < 30  # bytes after the end


def test_data_that_are_too_long_too_short_or_have_another_checksum():
    data = encoded(picture(11, 14))
    start = data.index(b"IDAT") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big")
    content = zlib.decompress(data[start : start + size])
    damaged = bytearray(zlib.compress(content))
    damaged[-1] ^= 1
    for stream in (
        zlib.compress(content + b"x"),
        zlib.compress(content[:-1]),
        zlib.compress(content)[:-5],
        bytes(damaged),
    ):
        assert decoded(data[: start - 8] + chunk(b"IDAT", stream) + chunk(b"IEND", b"")) is None
    again = data[: start - 8] + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    assert np.array_equal(pixels_of(again), by_pillow(data))


def test_a_bomb_is_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    data = encoded(picture(10, 10))
    with pytest.raises(CorruptImageError, match="more than 99 pixels"):
        store_file(data, max_px=None, quality=95)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert store_file(data, max_px=None, quality=95).how == "raw"
