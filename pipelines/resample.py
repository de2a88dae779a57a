"""Crop, then resize with the antialiased triangle filter, on uint8 images, in numba.

The filter is Pillow's BILINEAR and torch's `interpolate(mode="bilinear", antialias=True)`: its support grows with
the scale, and what lies outside the crop box is left out and the weights renormalised. Sums are float32 and
rounded once, at the end (Pillow also rounds between its two passes).
"""

# H, W the image's sides, h, w the crop's, S the output's, all in pixels

import math

import numpy as np
from numba import njit

from pipelines import simd


@njit(nogil=True, cache=True, error_model="numpy")
def triangle_weights(in_px: int, out_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Which input pixels make each output pixel along one axis, and with what weight.

    Every output pixel has the same number of taps, an even one (some of weight 0), so that the loops over them are
    predictable.

    Args:
        in_px: Length of the input axis, >= 1.
        out_px: Length of the output axis, >= 1.
    Returns:
        (first, weights): first input pixel, int64 [out_px], and the weights, which sum to 1, float32 [out_px, taps].
        Where the axis is shorter than the taps, those past its end have weight 0.
    """
    scale = in_px / out_px
    support = max(scale, 1.0)
    num_taps = 2 * math.ceil(support)  # the open interval centre +- support holds at most so many pixel centres
    last_first = max(in_px - num_taps, 0)
    first = np.empty(out_px, np.int64)
    weights = np.empty((out_px, num_taps), np.float32)
    inv_support = 1 / support
    for i in range(out_px):
        centre = scale * (i + 0.5) - 0.5
        start = min(max(math.ceil(centre - support), 0), last_first)
        total = 0.0
        for k in range(num_taps):
            j = start + k
            weights[i, k] = max(1.0 - abs(j - centre) * inv_support, 0.0) if j < in_px else 0.0
            total += weights[i, k]  # as rounded: a lone weight becomes 1 exactly
        for k in range(num_taps):
            weights[i, k] /= total
        first[i] = start
    return first, weights


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def resized_crop(image: np.ndarray, top_px: int, left_px: int, height_px: int, width_px: int, out: np.ndarray) -> None:
    """Crop a box and resize it into `out`; a box of the output's size is copied.

    Args:
        image: uint8 [H, W, 3], C-contiguous.
        top_px, left_px, height_px, width_px: The box; must lie inside the image (not checked).
        out: uint8 [S, S, 3], C-contiguous; written.
    """
    size_px = out.shape[0]
    rows = image.reshape(image.shape[0], image.shape[1] * 3)[:, 3 * left_px : 3 * (left_px + width_px)]
    out_rows = out.reshape(size_px, size_px * 3)
    if height_px == size_px and width_px == size_px:
        for y in range(size_px):
            _copy_row(rows[top_px + y], out_rows[y])
        return
    first_row, row_weights = triangle_weights(height_px, size_px)
    first_column, column_weights = triangle_weights(width_px, size_px)
    # Zeros behind the row: taps of weight 0 and the spare lane may reach there.
    blended = np.zeros(3 * (width_px + column_weights.shape[1] + 1), np.float32)
    levels = np.empty(3 * size_px + 1, np.uint8)  # one more, for the spare lane
    for y in range(size_px):
        top = top_px + first_row[y]
        _blend_rows(rows[top : top + row_weights.shape[1]], row_weights[y], blended[: 3 * width_px])
        _resize_row(blended, first_column, column_weights, levels)
        _copy_row(levels, out_rows[y])


@njit(nogil=True, cache=True, error_model="numpy")
def _copy_row(row: np.ndarray, out_row: np.ndarray) -> None:
    for i in range(len(out_row)):  # numba's slice assignment of a row is not vectorised
        out_row[i] = row[i]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _blend_rows(rows: np.ndarray, weights: np.ndarray, blended: np.ndarray) -> None:
    """Vertical pass: the weighted sum of at most `taps` rows, uint8 [., 3w] -> float32 [3w], two rows at a time."""
    if len(rows) == 1:
        row, weight = rows[0], weights[0]
        for i in range(len(blended)):
            blended[i] = weight * np.float32(row[i])
        return
    row, next_row, weight, next_weight = rows[0], rows[1], weights[0], weights[1]
    for i in range(len(blended)):
        blended[i] = weight * np.float32(row[i]) + next_weight * np.float32(next_row[i])
    for k in range(2, len(rows) - 1, 2):
        row, next_row, weight, next_weight = rows[k], rows[k + 1], weights[k], weights[k + 1]
        for i in range(len(blended)):
            blended[i] += weight * np.float32(row[i]) + next_weight * np.float32(next_row[i])
    if len(rows) % 2:
        row, weight = rows[len(rows) - 1], weights[len(rows) - 1]
        for i in range(len(blended)):
            blended[i] += weight * np.float32(row[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _resize_row(blended: np.ndarray, first: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> None:
    """Horizontal pass: float32 [3w + .] -> uint8 [3S + 1], one pixel a step; a mean of levels needs no clamp."""
    num_taps = weights.shape[1]
    flat_weights = weights.reshape(weights.size)
    for x in range(len(first)):
        position, tap = 3 * first[x], x * num_taps
        even = simd.multiply(simd.load(blended, position), simd.load_same(flat_weights, tap))
        odd = simd.multiply(simd.load(blended, position + 3), simd.load_same(flat_weights, tap + 1))
        for k in range(2, num_taps, 2):
            at = position + 3 * k
            even = simd.multiply_add(simd.load(blended, at), simd.load_same(flat_weights, tap + k), even)
            odd = simd.multiply_add(simd.load(blended, at + 3), simd.load_same(flat_weights, tap + k + 1), odd)
        simd.store_levels(simd.add(even, odd), levels, 3 * x)
