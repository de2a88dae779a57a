"""Decoding of the part of a JPEG that the views of a sample show, for jitted code without the GIL.

`jpeg_region.c` skips the rows above, stops after the last row, and crops the columns; every pixel equals that of a full
decoding. It is compiled at installation (setup.py). Without it, JPEGs are decoded in full (`turbojpeg`).
"""

import ctypes
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from numba import njit, types

from pipelines.engines.compiled import load_compiled

SOURCE = Path(__file__).with_name("jpeg_region.c")
MESSAGE_BYTES = 200  # libjpeg's JMSG_LENGTH_MAX

# (bytes, number of bytes, height, width, top, left, bottom, right, pixels, message)
_decode = types.ExternalFunction(
    "jpeg_region_decode", types.int32(types.intp, types.uint64, *[types.int32] * 6, *[types.intp] * 2)
)


@cache
def why_no_region_decoder() -> str | None:
    """Load the compiled library for LLVM; returns None, or the reason why it cannot be used."""
    try:
        library, path = load_compiled(SOURCE, "no C compiler or no header of libjpeg-turbo >= 2.1")
    except ImportError as error:
        return str(error)
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    if not library.jpeg_region_works(message):
        return f"{path.name} was compiled for another libjpeg ({message.value.decode(errors='replace')})"
    llvm.load_library_permanently(str(path))
    return None


# Not cached by itself, but as a part of the kernel that calls it, whose key has the checksum of the C source.
@njit(nogil=True)
def decode_jpeg_region(
    data: np.ndarray,
    height_px: int,
    width_px: int,
    top_px: int,
    left_px: int,
    bottom_px: int,
    right_px: int,
    pixels: np.ndarray,
    message: np.ndarray,
) -> int:
    """Decode a box of a JPEG to RGB, each pixel to its place in the whole image.

    Call it only if `why_no_region_decoder` has returned None.

    The bytes from the first to those of the last row are read, of a progressive JPEG all. Of the rest of the image,
    nothing is known: some pixels may be overwritten.

    Args:
        data: The file's bytes, uint8 [num_bytes].
        height_px, width_px: The expected size of the image.
        top_px, left_px, bottom_px, right_px: The box, not empty, inside the image; bottom and right are exclusive.
        pixels: Output, uint8, at least height * width * 3 long.
        message: Output, uint8 [MESSAGE_BYTES]: libjpeg's error or first warning, zero-terminated; empty if none.
    Returns:
        See `turbojpeg.decode_jpeg`.
    """
    return _decode(
        data.ctypes.data, len(data), height_px, width_px, top_px, left_px, bottom_px, right_px,
        pixels.ctypes.data, message.ctypes.data,
    )  # fmt: skip
