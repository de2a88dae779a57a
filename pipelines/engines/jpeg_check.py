"""A check of JPEGs that takes less time than libjpeg's decoding, and also gives the image at 1/8 of its size.

`jpeg_check.c` follows the Huffman codes of a baseline JPEG without making its coefficients. It says either that the
data are valid, in which case libjpeg decodes them without a warning, or nothing: then libjpeg has to be asked. It is
compiled at installation (setup.py). Without it, libjpeg checks every JPEG (`turbojpeg.decode_small_jpeg`).
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from pipelines.engines.compiled import load_compiled

SOURCE = Path(__file__).with_name("jpeg_check.c")
MAX_KEPT_BYTES = 64 << 20  # a larger workspace is freed after use


@cache
def why_no_jpeg_check() -> str | None:
    """None if the compiled check can be used, or the reason why it cannot."""
    try:
        _library()
    except ImportError as error:
        return str(error)
    return None


@cache
def _library() -> ctypes.CDLL:
    library, _ = load_compiled(SOURCE, "no C compiler")
    library.jpeg_check_workspace_bytes.restype = ctypes.c_size_t
    library.jpeg_check_workspace_bytes.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    pointer = ctypes.c_void_p
    library.jpeg_check.argtypes = [pointer, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, pointer, pointer]
    return library


class JpegChecker:
    """A workspace for one image at a time, and the Huffman tables of the last one; not thread-safe."""

    def __init__(self) -> None:
        self._workspace = np.zeros(0, np.uint8)

    def is_clean(self, data: np.ndarray, height_px: int, width_px: int, small: np.ndarray) -> bool:
        """Check a JPEG, without the GIL.

        Call it only if `why_no_jpeg_check` has returned None.

        Clean are baseline JPEGs of one scan, grey or of Y, Cb and Cr (4:4:4, 4:2:2, 4:4:0 or 4:2:0), in which each
        code exists, each block has 64 coefficients, each MCU and restart marker is in its place, and the end marker
        follows. What is after the end marker does not matter.

        Args:
            data: The file's bytes, uint8 [num_bytes].
            height_px, width_px: The expected size of the image, each up to 65,535.
            small: Output, uint8, at least ceil(height / 8) * ceil(width / 8) * 3 long. If the JPEG is clean, the pixels
                that `turbojpeg.decode_small_jpeg` writes for a divisor of 8 and sides above 4 px; else unchanged.
        Returns:
            True: libjpeg decodes the JPEG to this size, without a warning. False: ask libjpeg.
        """
        num_bytes = _library().jpeg_check_workspace_bytes(len(data), height_px, width_px)
        if len(self._workspace) < num_bytes:
            self._workspace = np.zeros(num_bytes, np.uint8)
        is_clean = _library().jpeg_check(
            data.ctypes.data, len(data), height_px, width_px, self._workspace.ctypes.data, small.ctypes.data
        )
        if len(self._workspace) > MAX_KEPT_BYTES:
            self._workspace = np.zeros(0, np.uint8)
        return bool(is_clean)
