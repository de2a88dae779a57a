"""One image file -> the bytes that a .beton stores: passed through unchanged where that is lossless and safe."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

SMALL_AREA_PX = 64 * 64  # lossless sources up to this area stay lossless: stored as raw pixels
MAX_JPEG_SIDE_PX = 65_500  # libjpeg's JPEG_MAX_DIMENSION
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: what every libjpeg-turbo decodes

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> the operation that undoes it


class CorruptImageError(Exception):
    """An image that cannot be used; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """One image as it will be written.

    Attributes:
        how: "passed" (the source's JPEG bytes), "encoded" (JPEG anew) or "raw" (pixels).
        data: JPEG bytes, or uint8 RGB [H, W, 3] where `how` is "raw".
        height_px: H.
        width_px: W.
    """

    how: Literal["passed", "encoded", "raw"]
    data: bytes | np.ndarray
    height_px: int
    width_px: int


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings (damaged EXIF, bomb): what matters comes as CorruptImageError. For the main thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def store_file(path: str, *, max_px: int | None, quality: int) -> StoredImage:
    """Read, decode and, only where needed, re-encode one image file.

    The content decides the format, not the file's name. JPEG bytes pass unchanged when they are 8-bit, of 1 or 3
    components, upright (EXIF) and no larger than `max_px`. Anything else becomes upright RGB, is downscaled, and is
    stored as JPEG (4:2:0), or as raw pixels where the source is no JPEG and the area is at most `SMALL_AREA_PX`.

    Args:
        path: The file.
        max_px: Largest side in pixels; None: as it is.
        quality: JPEG quality, 1..100.
    Raises:
        CorruptImageError: unreadable, empty, truncated, not an image, or too large.
    """
    try:
        return _store(Path(path).read_bytes(), max_px, quality)
    except CorruptImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise CorruptImageError(f"more than {limit} pixels: Pillow's limit against decompression bombs") from error
    except UnidentifiedImageError as error:
        raise CorruptImageError("not an image that Pillow knows") from error
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
        raise CorruptImageError(" ".join(str(error).split()) or type(error).__name__) from error


def store_pixels(pixels: np.ndarray, *, max_px: int | None) -> StoredImage:
    """An array as raw RGB pixels.

    Args:
        pixels: uint8 [H, W] (grey, repeated thrice) or [H, W, 3].
        max_px: Largest side in pixels; None: as it is.
    """
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
    if max_px is not None:
        rgb = np.asarray(_downscale(Image.fromarray(rgb), max_px))
    return StoredImage(how="raw", data=rgb, height_px=rgb.shape[0], width_px=rgb.shape[1])


def _store(data: bytes, max_px: int | None, quality: int) -> StoredImage:
    image = _decode(data)
    turn = UPRIGHT.get(_orientation(image))
    is_jpeg = image.format in ("JPEG", "MPO")  # MPO: a JPEG with further pictures appended
    too_large = max_px is not None and max(image.size) > max_px
    if is_jpeg and turn is None and not too_large and _passes_as_is(data):
        return StoredImage(how="passed", data=data, height_px=image.height, width_px=image.width)
    rgb = _to_rgb(image)
    rgb = _downscale(rgb if turn is None else rgb.transpose(turn), max_px)
    if not is_jpeg and rgb.width * rgb.height <= SMALL_AREA_PX:
        return StoredImage(how="raw", data=np.asarray(rgb), height_px=rgb.height, width_px=rgb.width)
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=quality)
    return StoredImage(how="encoded", data=encoded.getvalue(), height_px=rgb.height, width_px=rgb.width)


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise CorruptImageError("empty file")
    image = Image.open(io.BytesIO(data))
    # Pillow itself only warns up to twice its limit.
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    image.load()
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1


def _passes_as_is(data: bytes) -> bool:
    """Whether the JPEG's frame header promises 8 bits and 1 or 3 components, in a process that FFCV decodes."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            return marker in JPEG_FRAMES and data[at + 4] == 8 and data[at + 9] in (1, 3)
        # 0xFF may fill up before a marker; every other segment here carries its length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; "I" is 32-bit in memory, 16-bit in the files that exist
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65_535:
            raise CorruptImageError("32-bit pixels beyond 16 bits have no known scale")
        image = Image.fromarray(((levels * 255 + 32_767) // 65_535).astype(np.uint8))
    elif image.mode == "F":
        raise CorruptImageError("floating-point pixels have no known scale")
    elif image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return image.convert("RGB")


def _downscale(image: Image.Image, max_px: int | None) -> Image.Image:
    longest_px = max(image.size)
    if max_px is None and longest_px > MAX_JPEG_SIDE_PX:
        raise CorruptImageError(f"a side of {longest_px:,} px; a JPEG holds {MAX_JPEG_SIDE_PX:,}: pass --max-px")
    if max_px is None or longest_px <= max_px:
        return image
    width_px, height_px = (max(1, round(side * max_px / longest_px)) for side in image.size)
    return image.resize((width_px, height_px), Image.Resampling.LANCZOS)
