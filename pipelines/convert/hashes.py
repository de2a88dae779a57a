"""Two hashes of each image: one of its stored bytes, one of what it looks like.

Computed in jitted code without the GIL, from what a conversion has at hand: for a JPEG that passes unchanged, the image
at 1/8 of its size that checking it gives anyway. The hash of the look is the DCT hash known as pHash (Zauner 2010,
"Implementation and benchmarking of perceptual image hash functions"), as the package imagehash computes it in Python.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit

NUM_PIECES, PIECE_BYTES = (
    4,
    2048,
)  # of a JPEG of more than MAX_WHOLE_BYTES: evenly spaced, the first and last among them
MAX_WHOLE_BYTES = 16 << 10
GRID = 16  # cells per side of the small grey image
NUM_FREQUENCIES = 8  # per axis, from 0
MIN_CONTRAST = 2.0  # standard deviation of the cells' levels; what is flatter has no look to compare

_angles = (2 * np.arange(GRID)[None, :] + 1) * np.arange(NUM_FREQUENCIES)[:, None] * (math.pi / (2 * GRID))
_DCT = np.cos(_angles).astype(np.float32)  # [NUM_FREQUENCIES, GRID]; scale does not matter to signs about the median
_P1, _P2, _P3 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_S23, _S27, _S32, _S37 = np.uint64(23), np.uint64(27), np.uint64(32), np.uint64(37)


class Hashes(NamedTuple):
    """Hashes of one image; 0: unknown.

    Attributes:
        content: Of the stored bytes, 64 bits. Of a JPEG of more than 16 KiB, of its length and 8 KiB of it: files of
            one length that agree in these are taken for copies.
        look: Of the image at 16 x 16 px in grey, 64 bits, of which few differ between similar images; 0 also for an
            image without contrast or of fewer than 16 px per side, which is similar to nothing.
    """

    content: int
    look: int


NO_HASHES = Hashes(0, 0)


def hash_image(data: bytes | np.ndarray, small: np.ndarray) -> Hashes:
    """Hashes of one image.

    Args:
        data: What is stored: bytes of a JPEG, or pixels uint8 [H, W, 3].
        small: The image at a size of about 16 px or more per side, uint8 RGB [h, w, 3].
    """
    stored = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1)
    in_pieces = isinstance(data, bytes) and len(data) > MAX_WHOLE_BYTES
    content, look = _hash(stored, in_pieces, np.ascontiguousarray(small), _DCT)
    return Hashes(int(content), int(look))


@njit(nogil=True, cache=True)
def _hash(data: np.ndarray, in_pieces: bool, small: np.ndarray, dct: np.ndarray) -> tuple[np.uint64, np.uint64]:
    return _content(data, in_pieces), _look(small, dct)


@njit(nogil=True, cache=True)
def _content(data: np.ndarray, in_pieces: bool) -> np.uint64:
    """A multiplicative hash in four lanes (as xxHash64), never 0."""
    a, b, c, d = _P1, _P2, _P3, np.uint64(len(data))
    num_pieces, length = (NUM_PIECES, PIECE_BYTES) if in_pieces else (1, len(data))
    for k in range(num_pieces):
        start = (len(data) - length) * k // max(num_pieces - 1, 1)
        piece = data[start : start + length]
        num_words = length // 8
        words = piece[: num_words * 8].view(np.uint64)
        for i in range(0, num_words - 3, 4):
            a = _mix(a, words[i])
            b = _mix(b, words[i + 1])
            c = _mix(c, words[i + 2])
            d = _mix(d, words[i + 3])
        for i in range(num_words - num_words % 4, num_words):
            a = _mix(a, words[i])
        for i in range(num_words * 8, length):
            b = _mix(b, np.uint64(piece[i]))
    found = _mix(_mix(_mix(a, b), c), d)
    found ^= found >> _S37
    found *= _P3
    found ^= found >> _S32
    return found if found else _P1


@njit(nogil=True, cache=True)
def _mix(state: np.uint64, word: np.uint64) -> np.uint64:
    state ^= word * _P2
    state = (state << _S27) | (state >> _S37)
    return state * _P1


@njit(nogil=True, cache=True)
def _look(pixels: np.ndarray, dct: np.ndarray) -> np.uint64:
    if min(pixels.shape[0], pixels.shape[1]) < GRID:
        return np.uint64(0)
    cells = _cells(pixels)
    if cells.std() < MIN_CONTRAST:
        return np.uint64(0)
    rows = np.zeros((NUM_FREQUENCIES, GRID), np.float32)
    for u in range(NUM_FREQUENCIES):
        for i in range(GRID):
            for j in range(GRID):
                rows[u, j] += dct[u, i] * cells[i, j]
    waves = np.zeros(NUM_FREQUENCIES * NUM_FREQUENCIES, np.float32)
    for u in range(NUM_FREQUENCIES):
        for v in range(NUM_FREQUENCIES):
            for j in range(GRID):
                waves[u * NUM_FREQUENCIES + v] += rows[u, j] * dct[v, j]
    middle = np.median(waves[1:])
    found = np.uint64(0)
    for k in range(1, len(waves)):
        found = (found << np.uint64(1)) | np.uint64(waves[k] > middle)
    return found


@njit(nogil=True, cache=True)
def _cells(pixels: np.ndarray) -> np.ndarray:
    """Grey level of each cell, float32 [GRID, GRID]; columns are summed first, which a compiler vectorises."""
    height_px, width_px = pixels.shape[0], pixels.shape[1]
    rows, columns = _edges(height_px), _edges(width_px)
    values = pixels.reshape(height_px, width_px * 3)
    cells = np.empty((GRID, GRID), np.float32)
    sums = np.empty(width_px * 3, np.float32)
    for i in range(GRID):
        sums[:] = 0
        for y in range(rows[i, 0], rows[i, 1]):
            row = values[y]
            for x in range(len(sums)):
                sums[x] += row[x]
        for j in range(GRID):
            total = np.float32(0)
            for x in range(columns[j, 0], columns[j, 1]):
                total += 2 * sums[3 * x] + 5 * sums[3 * x + 1] + sums[3 * x + 2]
            area = 8 * (rows[i, 1] - rows[i, 0]) * (columns[j, 1] - columns[j, 0])
            cells[i, j] = total / np.float32(area)
    return cells


@njit(nogil=True, cache=True)
def _edges(num_px: int) -> np.ndarray:
    """First and last pixel + 1 of each cell, int64 [GRID, 2]."""
    edges = np.empty((GRID, 2), np.int64)
    for i in range(GRID):
        edges[i, 0] = i * num_px // GRID
        edges[i, 1] = (i + 1) * num_px // GRID
    return edges
