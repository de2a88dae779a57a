"""Crop, then resize with the antialiased triangle filter, on uint8 images, in numba.

The filter is Pillow's BILINEAR and torch's `interpolate(mode="bilinear", antialias=True)`: its support grows with
the scale, and what lies outside the crop box is left out and the weights renormalised. Sums are float32 and
rounded once, at the end (Pillow also rounds between its two passes).
"""

# H, W the image's sides, h, w the crop's, S the output's, all in pixels

import math

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, error_model="numpy")
def triangle_weights(in_px: int, out_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which input pixels make each output pixel along one axis, and with what weight.

    Args:
        in_px: Length of the input axis, >= 1.
        out_px: Length of the output axis, >= 1.
    Returns:
        (first, count, weights): first input pixel and number of pixels, int64 [out_px], and the weights, which
        sum to 1, float32 [out_px, most pixels].
    """
    scale = in_px / out_px
    support = max(scale, 1.0)
    first = np.empty(out_px, np.int64)
    count = np.empty(out_px, np.int64)
    weights = np.empty((out_px, 2 * math.ceil(support) + 1), np.float32)
    for i in range(out_px):
        centre = scale * (i + 0.5)
        start = max(int(centre - support + 0.5), 0)
        stop = min(int(centre + support + 0.5), in_px)
        while stop - start > 1 and abs(stop - 0.5 - centre) >= support:  # weight 0: not worth a pass
            stop -= 1
        total = 0.0
        for j in range(start, stop):
            total += max(1.0 - abs(j + 0.5 - centre) / support, 0.0)
        for j in range(start, stop):
            weights[i, j - start] = max(1.0 - abs(j + 0.5 - centre) / support, 0.0) / total
        first[i], count[i] = start, stop - start
    return first, count, weights


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
    first_row, num_rows, row_weights = triangle_weights(height_px, size_px)
    first_column, num_columns, column_weights = triangle_weights(width_px, size_px)
    blended = np.empty(3 * width_px, np.float32)
    for y in range(size_px):
        _blend_rows(rows, top_px + first_row[y], row_weights[y, : num_rows[y]], blended)
        _resize_row(blended, first_column, num_columns, column_weights, out_rows[y])


@njit(nogil=True, cache=True, error_model="numpy")
def _copy_row(row: np.ndarray, out_row: np.ndarray) -> None:
    for i in range(len(out_row)):  # numba's slice assignment of a row is not vectorised
        out_row[i] = row[i]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _blend_rows(rows: np.ndarray, first_row: int, weights: np.ndarray, blended: np.ndarray) -> None:
    """Vertical pass: the weighted sum of rows, uint8 [., 3w] -> float32 [3w]; vectorised along the row."""
    row = rows[first_row]
    weight = weights[0]
    for i in range(len(blended)):
        blended[i] = weight * np.float32(row[i])
    for k in range(1, len(weights)):
        row = rows[first_row + k]
        weight = weights[k]
        for i in range(len(blended)):
            blended[i] += weight * np.float32(row[i])


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _resize_row(
    blended: np.ndarray, first: np.ndarray, count: np.ndarray, weights: np.ndarray, out_row: np.ndarray
) -> None:
    """Horizontal pass: float32 [3w] -> uint8 [3S], rounded half to even; a mean of levels needs no clamp."""
    zero = np.float32(0)
    for x in range(len(first)):
        position = 3 * first[x]
        red, green, blue = zero, zero, zero
        for k in range(count[x]):
            weight = weights[x, k]
            red += weight * blended[position]
            green += weight * blended[position + 1]
            blue += weight * blended[position + 2]
            position += 3
        out_row[3 * x] = np.uint8(np.rint(red))
        out_row[3 * x + 1] = np.uint8(np.rint(green))
        out_row[3 * x + 2] = np.uint8(np.rint(blue))
