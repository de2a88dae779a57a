"""JPEG decoding for jitted code without the GIL: libjpeg-turbo's TurboJPEG, which FFCV's extension links.

numba cannot cache code that calls through ctypes; it can cache calls of symbols that LLVM resolves when the code
is loaded. The library is loaded with the first decompressor, and each function here takes one: LLVM knows the symbols
before numba compiles or loads the code. Raw pixels need no library. ffcv (and with it torch) is not imported.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from numba import njit, types

# What `decode_jpeg` and the kernels on top of it return.
OK, UNREADABLE, WRONG_SIZE = 0, 1, 2

_PIXEL_FORMAT_RGB = 0  # TJPF_RGB
# TJFLAG_ACCURATEDCT: Pillow's DCT. FFCV's own decoder takes the fast one, which is off by several levels.
_FLAGS = 4096
# libjpeg's warnings (jerror.h) that leave every pixel as it was written: stray bytes after the last one, and
# oddities of the header. Of several warnings the first is kept: stray bytes elsewhere may hide something worse.
_HARMLESS_WARNINGS = (
    "extraneous bytes before marker 0xd9",
    "Unknown Adobe color transform code",
    "unknown JFIF revision number",
    "Invalid SOS parameters for sequential JPEG",
)


@cache
def load_library() -> ctypes.CDLL:
    """TurboJPEG, for ctypes and for LLVM.

    Raises:
        ImportError: FFCV is not installed.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for path in Path(folder).glob("_libffcv*.so")]
    if not paths:
        raise ImportError("decoding JPEGs needs FFCV: pip install --no-deps ffcv==1.0.2")
    llvm.load_library_permanently(str(paths[0]))
    library = ctypes.CDLL(str(paths[0]))
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library


# (handle, bytes, number of bytes, addresses of width, height, subsampling, colour space)
_decompress_header = types.ExternalFunction(
    "tjDecompressHeader3", types.int32(*[types.intp] * 2, types.uint64, *[types.intp] * 4)
)
# (handle, bytes, number of bytes, pixels, width, row pitch or 0, height, pixel format, flags)
_decompress = types.ExternalFunction(
    "tjDecompress2", types.int32(*[types.intp] * 2, types.uint64, types.intp, *[types.int32] * 5)
)


class JpegDecoder:
    """One decompressor and the buffer for one image, for one thread at a time.

    Attributes:
        pixels: uint8 buffer, at least as long as asked for by `reserve`.
    """

    def __init__(self) -> None:
        self.pixels = np.empty(0, np.uint8)
        self._handle = 0

    @property
    def handle(self) -> int:
        """TurboJPEG's handle; made when it is first asked for.

        Raises:
            ImportError: FFCV is not installed.
        """
        if not self._handle:
            self._handle = load_library().tjInitDecompress()
            if not self._handle:
                raise MemoryError("TurboJPEG: no decompressor")
        return self._handle

    def reserve(self, num_bytes: int) -> None:
        """Make room for an image of so many bytes, keeping what is larger already."""
        if len(self.pixels) < num_bytes:
            self.pixels = np.empty(num_bytes, np.uint8)

    def last_message(self) -> str:
        """Why the last call failed."""
        return load_library().tjGetErrorStr2(self.handle).decode(errors="replace")

    def is_harmless(self) -> bool:
        """Whether the last failure was a warning that leaves the image whole; a worse message replaces its own."""
        return any(warning in self.last_message() for warning in _HARMLESS_WARNINGS)

    def renew(self) -> None:
        """Drop the decompressor: an error leaves it in the middle of a bad header, where the next image fails."""
        self.close()

    def close(self) -> None:
        """Free the decompressor; asking for the handle again makes another."""
        if self._handle:
            load_library().tjDestroy(self._handle)
            self._handle = 0


@njit(nogil=True, cache=True)
def decode_jpeg(handle: int, data: np.ndarray, height_px: int, width_px: int, pixels: np.ndarray) -> int:
    """Decode one JPEG to RGB.

    Args:
        handle: Of a JpegDecoder that no other thread uses.
        data: The file's bytes, uint8 [num_bytes].
        height_px, width_px: The size that the image must have.
        pixels: uint8, at least height * width * 3 long; written.
    Returns:
        OK, WRONG_SIZE (nothing is written), or UNREADABLE: the decompressor keeps the message. After a warning
        (`JpegDecoder.is_harmless`) the pixels are written too.
    """
    return _decode(handle, data, height_px, width_px, height_px, width_px, pixels)


@njit(nogil=True, cache=True)
def check_jpeg(handle: int, data: np.ndarray, height_px: int, width_px: int, pixels: np.ndarray) -> int:
    """What `decode_jpeg` would return, for less work.

    Every coefficient is read, which is where a JPEG can be damaged, but only an eighth of the picture's size made.

    Args:
        handle: See `decode_jpeg`.
        data: See `decode_jpeg`.
        height_px, width_px: See `decode_jpeg`.
        pixels: uint8, at least ceil(height / 8) * ceil(width / 8) * 3 long; written.
    """
    return _decode(handle, data, height_px, width_px, -(-height_px // 8), -(-width_px // 8), pixels)


@njit(nogil=True, cache=True)
def _decode(
    handle: int,
    data: np.ndarray,
    height_px: int,
    width_px: int,
    to_height_px: int,
    to_width_px: int,
    pixels: np.ndarray,
) -> int:
    num_bytes = np.uint64(len(data))
    facts = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = facts.ctypes.data
    # Its status is no verdict: a warning fails it, and so does a subsampling without a name, which decodes well.
    _decompress_header(handle, data.ctypes.data, num_bytes, at, at + 4, at + 8, at + 12)
    width_found_px, height_found_px = facts[0], facts[1]
    if width_found_px == 0:
        return UNREADABLE
    if width_found_px != width_px or height_found_px != height_px:
        return WRONG_SIZE
    target = pixels.ctypes.data
    status = _decompress(
        handle, data.ctypes.data, num_bytes, target, to_width_px, 0, to_height_px, _PIXEL_FORMAT_RGB, _FLAGS
    )
    return OK if status == 0 else UNREADABLE
