"""Crops uint8 images and resizes them with the antialiased triangle filter, in numba.

The filter is Pillow's BILINEAR and torch's `interpolate(mode="bilinear", antialias=True)`: its support grows with
the scale. Pixels outside the crop box are ignored and the weights are renormalised. Sums are float32 and
rounded once, at the end (Pillow also rounds between its two passes).
"""

# H, W sides of the image, h, w sides of the crop, S side of the output, all in pixels

import functools
import math

import numpy as np
from numba import njit

from pipelines import simd

Weights = tuple[np.ndarray, np.ndarray]  # result of `triangle_weights`, for one length or for several


@njit(nogil=True, cache=True, error_model="numpy")
def triangle_weights(in_px: int, out_px: int) -> Weights:
    """Compute the input pixels that contribute to each output pixel along one axis, and their weights.

    Every output pixel has the same even number of taps (some with weight 0), so that the loops over them have a fixed
    length.

    Args:
        in_px: Length of the input axis, >= 1.
        out_px: Length of the output axis, >= 1.
    Returns:
        (first, weights): first input pixel, int64 [out_px], and the weights, which sum to 1, float32 [out_px, taps].
        If the axis is shorter than the number of taps, taps past its end have weight 0.
    """
    scale = in_px / out_px
    support = max(scale, 1.0)
    num_taps = 2 * math.ceil(support)  # the open interval centre +- support contains at most this many pixel centres
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
            total += weights[i, k]  # sum of the rounded weights, so that a single weight becomes exactly 1
        for k in range(num_taps):
            weights[i, k] /= total
        first[i] = start
    return first, weights


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def resized_crop(image: np.ndarray, top_px: int, left_px: int, height_px: int, width_px: int, out: np.ndarray) -> None:
    """Crop a box and resize it into `out`; a box that has the output's size is copied.

    Args:
        image: uint8 [H, W, 3], C-contiguous.
        top_px, left_px, height_px, width_px: The box; must lie inside the image (not checked).
        out: Output, uint8 [S, S, 3], C-contiguous.
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
    if is_small(height_px, width_px, size_px):
        rows_from, columns_from = (first_row, row_weights), (first_column, column_weights)
        small_crop(image, top_px, left_px, height_px, width_px, rows_from, columns_from, out)
        return
    # Zeros after the row: taps of weight 0 and the spare lane may read them.
    blended = np.zeros(3 * (width_px + column_weights.shape[1] + 1), np.float32)
    levels = np.empty(3 * size_px + 1, np.uint8)  # one extra element for the spare lane
    for y in range(size_px):
        top = top_px + first_row[y]
        _blend_rows(rows[top : top + row_weights.shape[1]], row_weights[y], blended[: 3 * width_px])
        _resize_row(blended, first_column, column_weights, levels)
        _copy_row(levels, out_rows[y])


@njit(nogil=True, cache=True, error_model="numpy")
def is_small(height_px: int, width_px: int, size_px: int) -> bool:
    """Whether `small_crop` can be used: no side longer than the output's, at least eight numbers per row, no copy."""
    is_copied = height_px == size_px and width_px == size_px
    return max(height_px, width_px) <= size_px and width_px >= 3 and not is_copied


@functools.cache
def small_weights(size_px: int) -> Weights:
    """`triangle_weights` of all lengths up to the output's: int64 [S + 1, S] and float32 [S + 1, S, 2]; row 0 is 0."""
    first, weights = np.zeros((size_px + 1, size_px), np.int64), np.zeros((size_px + 1, size_px, 2), np.float32)
    for in_px in range(1, size_px + 1):
        first[in_px], weights[in_px] = triangle_weights(in_px, size_px)
    return first, weights


@njit(nogil=True, cache=True, error_model="numpy")
def small_crop(
    image: np.ndarray,
    top_px: int,
    left_px: int,
    height_px: int,
    width_px: int,
    rows_from: Weights,
    columns_from: Weights,
    out: np.ndarray,
) -> None:
    """`resized_crop` for a box for which `is_small` holds: two taps per axis, so the work is mostly loads and stores.

    Args:
        image: uint8 [H, W, 3], C-contiguous.
        top_px, left_px, height_px, width_px: The box; must lie inside the image (not checked).
        rows_from, columns_from: `triangle_weights` of the height and of the width: [S] and [S, 2] each.
        out: Output, uint8 [S, S, 3], C-contiguous.
    """
    first_row, first_column = rows_from[0], columns_from[0]
    row_weights, column_weights = rows_from[1].reshape(2 * out.shape[0]), columns_from[1].reshape(2 * out.shape[1])
    levels, out_levels = image.reshape(image.size), out.reshape(out.size)
    pitch, num, num_out = 3 * image.shape[1], 3 * width_px, 3 * out.shape[1]
    to_next = pitch if height_px > 1 else 0  # a single row is blended with itself, with weight 0
    blended = np.zeros(num + 4, np.float32)  # zeros after the row, for the spare lane
    resized = np.empty(num_out + 1, np.float32)
    for y in range(out.shape[0]):
        start = (top_px + first_row[y]) * pitch + 3 * left_px
        weight, next_weight = simd.load_same_eight(row_weights, 2 * y), simd.load_same_eight(row_weights, 2 * y + 1)
        for i in range(0, num, 8):
            at = min(i, num - 8)  # the last eight overlap the previous ones: nothing outside the box is read
            next_row = simd.multiply_round(simd.load_eight_levels(levels, start + to_next + at), next_weight)
            row = simd.load_eight_levels(levels, start + at)
            simd.store(simd.multiply_add(row, weight, next_row), blended, at)
        for x in range(out.shape[1]):
            position = 3 * first_column[x]
            odd = simd.multiply_round(simd.load(blended, position + 3), simd.load_same(column_weights, 2 * x + 1))
            both = simd.multiply_add(simd.load(blended, position), simd.load_same(column_weights, 2 * x), odd)
            simd.store(both, resized, 3 * x)
        for i in range(0, num_out, 8):
            at = min(i, num_out - 8)
            simd.store_levels(simd.load_eight(resized, at), out_levels, y * num_out + at)


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
    """Horizontal pass: float32 [3w + .] -> uint8 [3S + 1], one pixel per step; a weighted mean needs no clamp."""
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
