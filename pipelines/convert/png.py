"""Decodes the plain kind of PNG without the GIL: 8 bits, grey or RGB, no transparency, no interlacing.

ISA-L inflates faster than zlib, with which Pillow does it. What is not plain, or not whole, is left to Pillow,
and so is the verdict on it. PNG is lossless: the pixels are Pillow's. Of the format: Portable Network Graphics (PNG)
Specification, third edition, W3C 2025, sections 5, 7, 9 and 11.
"""

import struct
from collections.abc import Iterator

import numpy as np
from isal import isal_zlib
from isal.igzip_lib import IsalError
from numba import njit

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3}  # by colour type
# Chunks that do not change what Pillow makes of the pixels.
_WITHOUT_EFFECT = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"tIME", b"bKGD", b"sBIT", b"tEXt")
_TURNING_TEXTS = (b"Raw profile", b"XML:com.adobe.xmp")  # Pillow looks in them for an orientation
_MAX_TEXT_BYTES = 1 << 16


def png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) that a plain PNG says it has; None: it is not plain, or no PNG."""
    if data[:16] != _SIGNATURE + b"\0\0\0\rIHDR" or len(data) < 33:
        return None
    width_px, height_px, bits, colour, *methods = struct.unpack(">IIBBBBB", data[16:29])
    is_plain = bits == 8 and colour in _CHANNELS and not any(methods)
    return (height_px, width_px) if is_plain and height_px and width_px else None


def decode_png(data: bytes, height_px: int, width_px: int) -> np.ndarray | None:
    """Decode a PNG that `png_size` takes for plain.

    Args:
        data: The file's bytes.
        height_px: See `png_size`; the caller has bounded the area.
        width_px: See `png_size`.
    Returns:
        uint8 RGB [H, W, 3]; None: Pillow has to decide.
    """
    num_channels = _CHANNELS[data[25]]
    num_bytes = height_px * (1 + width_px * num_channels)
    try:
        inflater = isal_zlib.decompressobj()
        rows = inflater.decompress(b"".join(_image_data(data)), num_bytes + 1)
    except (_NotPlainError, IsalError):  # type: ignore  # its stub takes the class for an instance
        return None
    if len(rows) != num_bytes or not inflater.eof:
        return None
    pixels = np.empty((height_px, width_px * num_channels), np.uint8)
    if not _undo_filters(np.frombuffer(rows, np.uint8).reshape(height_px, -1), num_channels, pixels):
        return None
    pixels = pixels.reshape(height_px, width_px, num_channels)
    return pixels if num_channels == 3 else np.repeat(pixels, 3, axis=2)


class _NotPlainError(Exception):
    """A chunk that Pillow has to see."""


def _image_data(data: bytes) -> Iterator[bytes]:
    """The contents of the chunks IDAT.

    Raises:
        _NotPlainError: another chunk that matters, a wrong checksum, or no end.
    """
    view, at, has_ended = memoryview(data), len(_SIGNATURE), False
    num_idat = 0
    while at + 12 <= len(data):
        num_bytes, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        stop = at + 8 + num_bytes
        if isal_zlib.crc32(view[at + 4 : stop]) != int.from_bytes(view[stop : stop + 4], "big") or stop + 4 > len(data):
            raise _NotPlainError
        if kind == b"IEND":
            return
        if kind == b"IDAT":
            if has_ended:
                raise _NotPlainError
            num_idat += 1
            yield bytes(view[at + 8 : stop])
        elif kind == b"IHDR" and at == len(_SIGNATURE):
            pass
        elif kind not in _WITHOUT_EFFECT or _may_turn(bytes(view[at + 8 : stop]) if kind == b"tEXt" else b""):
            raise _NotPlainError
        else:
            has_ended = num_idat > 0
        at = stop + 4
    raise _NotPlainError


def _may_turn(text: bytes) -> bool:
    return len(text) > _MAX_TEXT_BYTES or text.startswith(_TURNING_TEXTS)


@njit(nogil=True, cache=True)
def _undo_filters(rows: np.ndarray, num_channels: int, pixels: np.ndarray) -> bool:
    """Section 9.2: add to each byte what its row's filter predicts from its neighbours to the left and above.

    Args:
        rows: uint8 [H, 1 + W * num_channels], a filter's number and filtered bytes.
        num_channels: 1 or 3.
        pixels: uint8 [H, W * num_channels], filled.
    Returns:
        Whether all filters are known.
    """
    num = pixels.shape[1]
    above = np.zeros(num, np.uint8)
    for y in range(len(rows)):
        kind, row, out = rows[y, 0], rows[y, 1:], pixels[y]
        if kind == 0:
            out[:] = row
        elif kind == 2:
            for x in range(num):
                out[x] = row[x] + above[x]
        elif kind > 4:
            return False
        elif num_channels == 3:
            _undo_row(kind, row, above, out)
        else:
            _undo_channel(kind, row, above, out)
        above = out
    return True


@njit(nogil=True, cache=True, inline="always")
def _undo(kind: np.uint8, value: np.int32, left: np.int32, up: np.int32, corner: np.int32) -> np.int32:
    if kind == 1:
        return np.int32((value + left) & 255)
    if kind == 3:
        return np.int32((value + ((left + up) >> 1)) & 255)
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    predicted = up if to_up <= to_corner else corner
    if to_left <= min(to_up, to_corner):  # one comparison: the compiler makes a selection of it, without a branch
        predicted = left
    return np.int32((value + predicted) & 255)


@njit(nogil=True, cache=True)
def _undo_row(kind: np.uint8, row: np.ndarray, above: np.ndarray, out: np.ndarray) -> None:
    """A row of RGB, whose three channels do not wait for each other."""
    red = green = blue = up_red = up_green = up_blue = np.int32(0)
    for x in range(0, len(out) - 2, 3):
        corner_red, corner_green, corner_blue = up_red, up_green, up_blue
        up_red, up_green, up_blue = np.int32(above[x]), np.int32(above[x + 1]), np.int32(above[x + 2])
        red = _undo(kind, np.int32(row[x]), red, up_red, corner_red)
        green = _undo(kind, np.int32(row[x + 1]), green, up_green, corner_green)
        blue = _undo(kind, np.int32(row[x + 2]), blue, up_blue, corner_blue)
        out[x], out[x + 1], out[x + 2] = red, green, blue


@njit(nogil=True, cache=True)
def _undo_channel(kind: np.uint8, row: np.ndarray, above: np.ndarray, out: np.ndarray) -> None:
    left = up = np.int32(0)
    for x in range(len(out)):
        corner, up = up, np.int32(above[x])
        left = _undo(kind, np.int32(row[x]), left, up, corner)
        out[x] = left
