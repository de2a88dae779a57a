"""Converts one image file to the bytes stored in a .beton; passed through unchanged if that is lossless and safe."""

import io
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipelines.beton.format import MAX_SIDE_PX
from pipelines.convert.content import HEIC, can_read_heic, format_of, register_heic
from pipelines.convert.hashes import NO_HASHES, Hashes, hash_image
from pipelines.convert.png import decode_png, png_size
from pipelines.convert.source import Item
from pipelines.engines.jpeg_check import JpegChecker, why_no_jpeg_check
from pipelines.engines.turbojpeg import OK, WRONG_SIZE, JpegDecoder, decode_jpeg, decode_small_jpeg, load_library
from pipelines.errors import DataError, one_line
from pipelines.files import MAX_FILE_BYTES, read_file
from pipelines.jpeg_scans import MAX_SCANS, has_too_many_scans
from pipelines.printable import printable

T = TypeVar("T")

# The formats that are read. Pillow would also start other programs, such as Ghostscript for a PostScript file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
SMALL_AREA_PX = 64 * 64  # lossless sources up to this area are stored as raw pixels and stay lossless
MAX_JPEG_SIDE_PX = 65_500  # libjpeg's JPEG_MAX_DIMENSION
MAX_KEPT_BYTES = 64 << 20  # a thread's decoding buffer is freed if it is larger
SMALL_PX = 256  # a JPEG's shorter side, from which on 1/8 of its size is enough for its hash
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG with more images appended
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: decoded by every libjpeg-turbo

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
    """One image in the form in which it will be written.

    Attributes:
        how: "passed" (the source's JPEG bytes), "encoded" (re-encoded as JPEG) or "raw" (pixels).
        data: JPEG bytes, or uint8 RGB [H, W, 3] if `how` is "raw".
        height_px: H.
        width_px: W.
        hashes: For counting duplicates.
    """

    how: Literal["passed", "encoded", "raw"]
    data: bytes | np.ndarray
    height_px: int
    width_px: int
    hashes: Hashes = NO_HASHES


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings (damaged EXIF, bomb): real problems raise CorruptImageError. For the main thread."""
    with warnings.catch_warnings():
        silence_pillow()
        yield


def silence_pillow() -> None:
    """Same as `quiet_pillow`, for a whole process."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def store_items(items: list[Item], max_px: int | None, quality: int) -> list[StoredImage | CorruptImageError]:
    """Convert several images; runs in a worker thread or process.

    Args:
        items: See `Item`.
        max_px: See `store_file`.
        quality: See `store_file`.
    Returns:
        For each item, the image to store, or the error.
    """
    return [_store_or_reason(item.image, max_px, quality) for item in items]


def _store_or_reason(
    image: str | bytes | np.ndarray | Image.Image, max_px: int | None, quality: int
) -> StoredImage | CorruptImageError:
    try:
        if isinstance(image, np.ndarray):
            return store_pixels(image, max_px=max_px)
        if isinstance(image, Image.Image):
            return _encode(_to_rgb(image), None, max_px, quality, is_jpeg=False)
        return store_file(image, max_px=max_px, quality=quality)
    except CorruptImageError as error:
        return error


def read_upright(file: str | bytes) -> np.ndarray:
    """Read one image file as `store_file` does, before its pixels are stored.

    Args:
        file: The file's path or bytes.
    Returns:
        uint8 RGB [H, W, 3], upright.
    Raises:
        CorruptImageError: see `store_file`.
    """
    return _or_reason(_read_upright, file)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a Pillow image, upright, with transparency on white; see `_to_rgb` for what is refused.

    Raises:
        CorruptImageError: a mode that cannot be converted, or more pixels than Pillow's limit.
    """
    return _or_reason(_upright_rgb, image)


def _upright_rgb(image: Image.Image) -> np.ndarray:
    _check_area(image.width, image.height)
    image.load()
    rgb, turn = _to_rgb(image), UPRIGHT.get(_orientation(image))
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _read_upright(file: str | bytes) -> np.ndarray:
    data = _bytes_of(file)
    frame = _read_frame(data)
    if frame is None:
        pixels = _read_png(data)
        return _upright_rgb(_open_to_read(data)) if pixels is None else pixels
    _check_frame(frame, data)
    pixels = decode_as_engines_do(data, frame.height_px, frame.width_px)
    turn = UPRIGHT.get(_orientation(_open(data))) if frame.may_be_turned else None
    return pixels.copy() if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def store_file(file: str | bytes, *, max_px: int | None, quality: int) -> StoredImage:
    """Read, decode and, only where needed, re-encode one image file.

    The format is detected from the content, not from the file name. JPEG bytes are passed unchanged if they are 8-bit,
    have 1 or 3 components, are upright (EXIF) and no larger than `max_px`. Everything else is converted to upright RGB,
    downscaled, and stored as JPEG (4:2:0), or as raw pixels if the source is not a JPEG and the area is at most
    `SMALL_AREA_PX`. Of an animation, the first frame is used. JPEGs are decoded with the decoder used in training, so
    every image accepted here can be decoded there. `pipelines.convert.png` decodes plain PNGs, and Pillow all other
    images, including CMYK.

    Args:
        file: The file's path or bytes.
        max_px: Largest side in pixels; None: no limit.
        quality: JPEG quality, 1..100.
    Raises:
        CorruptImageError: unreadable, empty, more than `MAX_FILE_BYTES`, truncated, not an image, or too many pixels.
    """
    return _or_reason(lambda given: _store(_bytes_of(given), max_px, quality), file)


def _or_reason(function: Callable[[Any], T], argument: Any) -> T:
    """Call a function, and turn what Pillow raises into a CorruptImageError."""
    try:
        return function(argument)
    except (CorruptImageError, DataError):  # DataError: without the decoder, no JPEG can be converted
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise CorruptImageError(f"more than {limit} pixels: Pillow's limit against decompression bombs") from error
    except UnidentifiedImageError as error:
        raise CorruptImageError(f"not an image ({', '.join(FORMATS)} are read)") from error
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error and more
        reason = error.strerror if isinstance(error, OSError) else None
        raise CorruptImageError(printable(reason or one_line(error))) from error


def _bytes_of(file: str | bytes) -> bytes:
    data = file if isinstance(file, bytes) else read_file(file)
    if not data:
        raise CorruptImageError("empty file")
    if len(data) > MAX_FILE_BYTES:
        raise CorruptImageError(f"{len(data):,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return data


def store_pixels(pixels: np.ndarray, *, max_px: int | None) -> StoredImage:
    """Convert an array to raw RGB pixels.

    Args:
        pixels: uint8 [H, W] (grey, repeated three times) or [H, W, 3].
        max_px: Largest side in pixels; None: no limit.
    """
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
    if max_px is not None or max(rgb.shape) > MAX_SIDE_PX:
        rgb = np.asarray(_downscale(Image.fromarray(rgb), max_px))
    return _raw(rgb)


def _store(data: bytes, max_px: int | None, quality: int) -> StoredImage:
    frame = _read_frame(data)
    if frame is None:
        if (pixels := _read_png(data)) is not None:
            return _encode(Image.fromarray(pixels), None, max_px, quality, is_jpeg=False)
        image = _open_to_read(data)
        image.load()  # this also applies and drops the orientation of a TIFF
        is_jpeg = image.format in JPEG_FORMATS
        return _encode(_to_rgb(image), UPRIGHT.get(_orientation(image)), max_px, quality, is_jpeg=is_jpeg)
    turn = UPRIGHT.get(_orientation(_open(data))) if frame.may_be_turned else None
    _check_frame(frame, data)
    if turn is None and (max_px is None or max(frame.width_px, frame.height_px) <= max_px):
        small = check_as_engines_do(data, frame.height_px, frame.width_px)
        sides = {"height_px": frame.height_px, "width_px": frame.width_px}
        return StoredImage(how="passed", data=data, **sides, hashes=hash_image(data, small))
    pixels = decode_as_engines_do(data, frame.height_px, frame.width_px)
    return _encode(Image.fromarray(pixels), turn, max_px, quality, is_jpeg=True)


def _read_png(data: bytes) -> np.ndarray | None:
    """uint8 RGB [H, W, 3] of a plain PNG; None: Pillow has to read it, or to say why not."""
    size = png_size(data)
    if size is None:
        return None
    _check_area(size[1], size[0])
    return decode_png(data, *size)


def _encode(
    rgb: Image.Image, turn: Image.Transpose | None, max_px: int | None, quality: int, *, is_jpeg: bool
) -> StoredImage:
    rgb = _downscale(rgb if turn is None else rgb.transpose(turn), max_px)
    if not is_jpeg and rgb.width * rgb.height <= SMALL_AREA_PX:
        return _raw(np.asarray(rgb))
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=quality)
    data, divisor = encoded.getvalue(), min(rgb.size) // SMALL_PX
    hashes = hash_image(data, np.asarray(rgb.reduce(divisor) if divisor > 1 else rgb))
    return StoredImage(how="encoded", data=data, height_px=rgb.height, width_px=rgb.width, hashes=hashes)


def _raw(rgb: np.ndarray) -> StoredImage:
    return StoredImage(how="raw", data=rgb, height_px=rgb.shape[0], width_px=rgb.shape[1], hashes=hash_image(rgb, rgb))


def _open(data: bytes) -> Image.Image:
    kind = format_of(data)
    if kind == HEIC:
        if not can_read_heic():
            raise CorruptImageError("HEIC: pip install pillow-heif, which reads it")
        register_heic()
    elif kind is not None and kind not in FORMATS:
        raise CorruptImageError(f"not an image but {kind} ({', '.join(FORMATS)} are read)")
    image = Image.open(io.BytesIO(data), formats=FORMATS if kind != HEIC else (HEIC,))
    _check_area(image.width, image.height)
    return image


def _open_to_read(data: bytes) -> Image.Image:
    image = _open(data)
    if image.format in JPEG_FORMATS:
        _check_scans(data)
    return image


def _check_scans(data: bytes) -> None:
    if has_too_many_scans(data):
        raise CorruptImageError(f"a JPEG of more than {MAX_SCANS} scans")


def _check_area(width_px: int, height_px: int) -> None:
    """Enforce Pillow's size limit; Pillow itself only warns up to twice the limit."""
    if Image.MAX_IMAGE_PIXELS and width_px * height_px > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


class _ThreadDecoder(threading.local):
    """A decompressor and a checker for each thread."""

    def __init__(self) -> None:
        self.decoder = JpegDecoder()
        self.checker = JpegChecker()


_thread = _ThreadDecoder()


def decode_as_engines_do(data: bytes | np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Decode a JPEG with the decoder used in training.

    Args:
        data: The file's bytes.
        height_px: The expected height.
        width_px: The expected width.
    Returns:
        uint8 RGB [H, W, 3]; overwritten by the next call in the same thread.
    Raises:
        CorruptImageError: truncated, damaged, or of another size.
    """
    num_bytes = height_px * width_px * 3
    pixels = _judge(decode_jpeg, data, height_px, width_px, num_bytes)
    return pixels[:num_bytes].reshape(height_px, width_px, 3)


def check_as_engines_do(data: bytes | np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Make the same checks as `decode_as_engines_do` at a part of the size, which takes less time.

    Most JPEGs are not decoded at all (`JpegChecker`), which gives the same pixels.

    Returns:
        The image at 1/8 of its size, or at 1/4 or more if it is small: uint8 RGB [h, w, 3]; overwritten by the next
        call in the same thread.
    """
    divisor = 8
    while divisor > 1 and min(height_px, width_px) * 8 < SMALL_PX * divisor:
        divisor //= 2
    shape = -(-height_px // divisor), -(-width_px // divisor), 3
    num_bytes = math.prod(shape)
    if divisor == 8 and why_no_jpeg_check() is None:
        pixels = _reserve(num_bytes).pixels
        if _thread.checker.is_clean(np.frombuffer(data, np.uint8), height_px, width_px, pixels):
            return pixels[:num_bytes].reshape(shape)
    return _judge(decode_small_jpeg, data, height_px, width_px, num_bytes, divisor)[:num_bytes].reshape(shape)


def _reserve(num_bytes: int) -> JpegDecoder:
    """This thread's decoder, with a buffer of at least `num_bytes`."""
    load_library()  # without it, nothing could decode what is stored
    decoder = _thread.decoder
    if len(decoder.pixels) > max(num_bytes, MAX_KEPT_BYTES):
        decoder.pixels = np.empty(0, np.uint8)
    decoder.reserve(num_bytes)
    return decoder


def _judge(
    decode: Callable[..., int],
    data: bytes | np.ndarray,
    height_px: int,
    width_px: int,
    num_bytes: int,
    *more: int,
) -> np.ndarray:
    """Call `decode` with `more` and a buffer of at least `num_bytes`, and return the buffer."""
    decoder = _reserve(num_bytes)
    status = decode(decoder.handle, np.frombuffer(data, np.uint8), height_px, width_px, *more, decoder.pixels)
    if status == OK or (status != WRONG_SIZE and decoder.is_harmless()):
        return decoder.pixels
    message = decoder.last_message()
    if status == WRONG_SIZE:
        raise CorruptImageError(f"damaged JPEG (not {height_px}x{width_px} as recorded)")
    ends_early = "Premature end" in message or "missing SOS" in message
    raise CorruptImageError(f"{'truncated' if ends_early else 'damaged'} JPEG ({message})")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF does not affect the pixels
        return 1


class _Frame(NamedTuple):
    """Contents of a JPEG's headers.

    Attributes:
        height_px: Height.
        width_px: Width.
        may_be_turned: Whether there is a segment that may contain an orientation, such as EXIF or XMP.
        is_progressive: Whether it has several scans.
    """

    height_px: int
    width_px: int
    may_be_turned: bool
    is_progressive: bool


def _check_frame(frame: _Frame, data: bytes) -> None:
    _check_area(frame.width_px, frame.height_px)
    if frame.is_progressive:
        _check_scans(data)


def _read_frame(data: bytes) -> _Frame | None:
    """Read the frame header of an 8-bit JPEG with 1 or 3 components, in a coding process that FFCV decodes; else None.

    Pillow's parser of all headers takes longer than decoding a small image, and holds the GIL.
    """
    at, may_be_turned = 2, False
    if data[:2] != b"\xff\xd8":
        return None
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            height_px, width_px = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            passes = marker in JPEG_FRAMES and data[at + 4] == 8 and data[at + 9] in (1, 3)
            frame = _Frame(height_px, width_px, may_be_turned, is_progressive=marker == 0xC2)
            return frame if passes and height_px and width_px else None
        may_be_turned = may_be_turned or marker == 0xE1
        # 0xFF bytes may pad before a marker; every other segment here contains its length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; "I" is 32-bit in memory, but 16-bit in files found in practice
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
