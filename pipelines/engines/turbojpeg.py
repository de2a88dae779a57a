"""JPEG decoding for jitted code without the GIL: libjpeg-turbo's TurboJPEG, which FFCV's extension links to.

numba cannot cache code that calls through ctypes, but it can cache calls to symbols that LLVM resolves when the code
is loaded. The library is loaded with the first decompressor, which every function here takes as an argument, so LLVM
knows the symbols before numba compiles or loads the code. Raw pixels need no library. ffcv (and therefore torch) is
not imported.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
from numba import njit, types

from pipelines.engines.jpeg_region import MESSAGE_BYTES
from pipelines.errors import DataError

# Return values of `decode_jpeg` and of the kernels that call it.
OK, UNREADABLE, WRONG_SIZE = 0, 1, 2

_PIXEL_FORMAT_RGB = 0  # TJPF_RGB
# TJFLAG_ACCURATEDCT: Pillow's DCT. FFCV's own decoder uses the fast one, which deviates by several levels.
# TJFLAG_LIMITSCANS: at most 500 scans. `pipelines.jpeg_scans` says why.
_FLAGS = 4096 | 32768
# libjpeg's warnings (jerror.h) that do not affect any pixel: extra bytes after the last one, and irregularities of the
# header. Only the first of several warnings is kept: extra bytes elsewhere may hide a more serious one.
_HARMLESS_WARNINGS = (
    "extraneous bytes before marker 0xd9",
    "Unknown Adobe color transform code",
    "unknown JFIF revision number",
    "Invalid SOS parameters for sequential JPEG",
)


@cache
def load_library() -> ctypes.CDLL:
    """Load TurboJPEG for ctypes and for LLVM.

    Raises:
        DataError: FFCV is not installed.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for path in Path(folder).glob("_libffcv*.so")]
    if not paths:
        raise DataError("decoding JPEGs needs FFCV: pip install --no-deps ffcv==1.0.2")
    llvm.load_library_permanently(str(paths[0]))
    library = ctypes.CDLL(str(paths[0]))
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    library.tjGetErrorStr2.restype = ctypes.c_char_p
    return library


_init_decompress = types.ExternalFunction("tjInitDecompress", types.intp())
_destroy = types.ExternalFunction("tjDestroy", types.int32(types.intp))
# (handle, bytes, number of bytes, addresses of width, height, subsampling, colour space)
_decompress_header = types.ExternalFunction(
    "tjDecompressHeader3", types.int32(*[types.intp] * 2, types.uint64, *[types.intp] * 4)
)
# (handle, bytes, number of bytes, pixels, width, row pitch or 0, height, pixel format, flags)
_decompress = types.ExternalFunction(
    "tjDecompress2", types.int32(*[types.intp] * 2, types.uint64, types.intp, *[types.int32] * 5)
)


class JpegDecoder:
    """A decompressor and a buffer for one image; not thread-safe.

    Attributes:
        pixels: uint8 buffer, at least as large as requested by `reserve`.
        message: uint8 [MESSAGE_BYTES] for `decode_jpeg_region`; empty if another function decoded last.
    """

    def __init__(self) -> None:
        self.pixels = np.empty(0, np.uint8)
        self.message = np.zeros(MESSAGE_BYTES, np.uint8)
        self._handle = np.zeros(1, np.int64)

    @property
    def handle(self) -> np.ndarray:
        """TurboJPEG's handle, int64 [1]: each decoding puts a new one there. (0: none yet.)

        Raises:
            DataError: FFCV is not installed.
        """
        load_library()
        return self._handle

    def reserve(self, num_bytes: int) -> None:
        """Make the buffer at least `num_bytes` large; a larger buffer is kept."""
        if len(self.pixels) < num_bytes:
            self.pixels = np.empty(num_bytes, np.uint8)

    def last_message(self) -> str:
        """Error message of the last failed call."""
        of_region = self.message.tobytes().partition(b"\0")[0]
        return (of_region or load_library().tjGetErrorStr2(int(self._handle[0]))).decode(errors="replace")

    def is_harmless(self) -> bool:
        """Whether the last failure was a warning that does not affect the image; a worse message would replace it."""
        return any(warning in self.last_message() for warning in _HARMLESS_WARNINGS)

    def close(self) -> None:
        """Free the decompressor; the next decoding creates a new one."""
        if self._handle[0]:
            load_library().tjDestroy(int(self._handle[0]))
            self._handle[0] = 0


@njit(nogil=True, cache=True)
def decode_jpeg(handle: np.ndarray, data: np.ndarray, height_px: int, width_px: int, pixels: np.ndarray) -> int:
    """Decode one JPEG to RGB.

    Args:
        handle: Handle of a JpegDecoder that no other thread uses.
        data: The file's bytes, uint8 [num_bytes].
        height_px, width_px: The expected size of the image.
        pixels: Output, uint8, at least height * width * 3 long.
    Returns:
        OK, WRONG_SIZE (nothing is written), or UNREADABLE (the decompressor keeps the message). After a warning
        (`JpegDecoder.is_harmless`), the pixels are written as well.
    """
    return _decode(handle, data, height_px, width_px, height_px, width_px, pixels)


@njit(nogil=True, cache=True)
def check_jpeg(handle: np.ndarray, data: np.ndarray, height_px: int, width_px: int, pixels: np.ndarray) -> int:
    """Return what `decode_jpeg` would return, at a lower cost: `decode_small_jpeg` at 1/8 of the size."""
    return decode_small_jpeg(handle, data, height_px, width_px, 8, pixels)


@njit(nogil=True, cache=True)
def decode_small_jpeg(
    handle: np.ndarray, data: np.ndarray, height_px: int, width_px: int, divisor: int, pixels: np.ndarray
) -> int:
    """Decode a JPEG at a part of its size, which costs little more than reading its coefficients.

    Every coefficient is read, which is where a JPEG can be damaged.

    Args:
        handle: See `decode_jpeg`.
        data: See `decode_jpeg`.
        height_px, width_px: See `decode_jpeg`.
        divisor: 1, 2, 4 or 8.
        pixels: Output, uint8, at least ceil(height / divisor) * ceil(width / divisor) * 3 long.
    Returns:
        See `decode_jpeg`.
    """
    return _decode(handle, data, height_px, width_px, -(-height_px // divisor), -(-width_px // divisor), pixels)


@njit(nogil=True, cache=True)
def _decode(
    handle: np.ndarray,
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
    # Its status is not used: it also fails on a warning, and on a subsampling without a name, which decodes correctly.
    # A decompressor keeps the tables of an image; a damaged one that lacks its own would be decoded with them. A new
    # decompressor takes a microsecond.
    if handle[0] != 0:
        _destroy(handle[0])
    handle[0] = _init_decompress()
    if handle[0] == 0:
        return UNREADABLE
    _decompress_header(handle[0], data.ctypes.data, num_bytes, at, at + 4, at + 8, at + 12)
    width_found_px, height_found_px = facts[0], facts[1]
    if width_found_px == 0:
        return UNREADABLE
    if width_found_px != width_px or height_found_px != height_px:
        return WRONG_SIZE
    target = pixels.ctypes.data
    status = _decompress(
        handle[0], data.ctypes.data, num_bytes, target, to_width_px, 0, to_height_px, _PIXEL_FORMAT_RGB, _FLAGS
    )
    return OK if status == 0 else UNREADABLE
