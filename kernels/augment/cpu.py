"""The pixel op in numba: float32 planes in a per-thread scratch, a few rows at a time, so that they stay in L1.

No prange: FFCV's thread may be inside numba at the same time, and numba's workqueue layer rejects concurrent
parallel calls. The functions release the GIL and plain threads share out the samples; no sample depends on
another, so the result does not depend on the number of threads.
One file: numba's cache on disk looks at the caller's file only, and would miss a change in another one.
"""

# B samples, Vg views of one size, H and W height and width in pixels; r, g, b float32 [P] pieces of the planes

import functools
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit

from kernels.augment.params import BRIGHTNESS, CONTRAST, HUE, SATURATION

# Reassociation lets LLVM vectorise the sums; no op divides by zero or meets a NaN.
_jit = njit(nogil=True, cache=True, fastmath=True, error_model="numpy")

_CHUNK_PX = 1024  # three float32 planes of it are 12 KiB: L1
_CHUNKS_PER_THREAD = 4  # blurred views take longer than others: smaller shares even that out
_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(x) for x in (0, 1, 2, 3, 4, 6))
_LEVEL = np.float32(1 / 255)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's grey


def augment_numba(
    views: np.ndarray, params: np.ndarray, mean: Sequence[float], std: Sequence[float], num_threads: int
) -> torch.Tensor:
    """Every op of every view; arguments as in `augment`, params C-contiguous.

    Returns:
        float32 [Vg, B, H, W, 3].
    """
    num_samples, num_views, height, width, _ = views.shape
    out = torch.empty((num_views, num_samples, height, width, 3))
    scale = np.asarray(1 / np.asarray(std, np.float64), np.float32)
    shift = np.asarray(-np.asarray(mean, np.float64) / np.asarray(std, np.float64), np.float32)
    arguments = (np.ascontiguousarray(views), params, scale, shift, out.numpy())
    if num_threads == 1:
        _augment_range(*arguments, 0, num_samples)
        return out
    edges = np.linspace(0, num_samples, _CHUNKS_PER_THREAD * num_threads + 1).astype(int).tolist()
    jobs = [_pool(num_threads).submit(_augment_range, *arguments, *edge) for edge in itertools.pairwise(edges)]
    for job in jobs:
        job.result()
    return out


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="augment")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the object but not its threads


@_jit
def _augment_range(views, params, scale, shift, out, start, stop):
    """Views of the samples start..stop into out."""
    height, width = views.shape[2], views.shape[3]
    planes = np.empty((3, height * width), np.float32)
    scratch = np.empty_like(planes)
    line = np.empty(3 * width, np.float32)  # a row with reflected ends: the radius is below the width
    weights = np.empty(max(height, width), np.float32)
    for sample in range(start, stop):
        for view in range(views.shape[1]):
            record = params[sample, view]
            _colour(views[sample, view], record, planes, scratch)
            if record.blur_sigma > _ZERO:
                radius = _blur_weights(record.blur_sigma, record.blur_kernel_px, weights)
                for channel in range(3):
                    _blur(planes[channel].reshape(height, width), scratch.reshape(scratch.size), line, weights, radius)
            if record.solarize:
                _solarize(planes.reshape(planes.size), record.solarize_threshold)
            _store(planes, scale, shift, out[view, sample].reshape(planes.size))


@_jit
def _colour(image, record, planes, scratch):
    """Affine, flip, jitter and grayscale of one view, uint8 [H, W, 3], into planes [3, H * W], in [0, 1].

    Contrast needs the mean grey of the whole view, so what precedes it runs over every piece first.
    """
    height, width, _ = image.shape
    order, factor = record.jitter_order, record.jitter_factor
    num_parts = 4 if record.jitter else 0
    contrast_at = num_parts
    for place in range(num_parts):
        if order[place] == CONTRAST and factor[CONTRAST] != _ONE:
            contrast_at = place
    has_contrast = contrast_at < num_parts
    if record.affine:
        _load(image, False, scratch, 0, height)
        _affine(scratch, record.affine_matrix, record.flip, planes, height, width)
    num_rows = max(1, _CHUNK_PX // width)
    grey_sum = 0.0
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        if not record.affine:
            _load(image, record.flip, planes, top, bottom)
        r, g, b = _piece(planes, top * width, bottom * width)
        _jitter(r, g, b, order[:contrast_at], factor)
        if has_contrast:
            grey_sum += _sum_grey(r, g, b)
    if not has_contrast and not record.grayscale:
        return
    grey_mean = np.float32(grey_sum / (height * width))
    for top in range(0, height, num_rows):
        r, g, b = _piece(planes, top * width, min(top + num_rows, height) * width)
        if has_contrast:
            _contrast(r, g, b, factor[CONTRAST], grey_mean)
            _jitter(r, g, b, order[contrast_at + 1 :], factor)
        if record.grayscale:
            _grayscale(r, g, b)


@_jit
def _piece(planes, start, stop):
    # Unpacking planes[:, start:stop] would lose the contiguous layout, and with it vectorisation.
    return planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]


@_jit
def _load(image, flip, planes, top, bottom):
    """Rows top..bottom of uint8 [H, W, 3] into planes [3, H * W]."""
    width = image.shape[1]
    levels = image.reshape(image.size)
    if not flip:
        values = levels[3 * top * width : 3 * bottom * width]
        r, g, b = _piece(planes, top * width, bottom * width)
        for i in range(r.size):
            r[i] = values[3 * i] * _LEVEL
            g[i] = values[3 * i + 1] * _LEVEL
            b[i] = values[3 * i + 2] * _LEVEL
        return
    for y in range(top, bottom):
        values = levels[3 * y * width : 3 * (y + 1) * width]
        r, g, b = _piece(planes, y * width, (y + 1) * width)
        for x in range(width):
            # Unsigned: numba's test for a negative index would stop vectorisation (2.4 against 1.0 us at 32 px).
            i = np.uint64(width - 1) - np.uint64(x)
            r[i] = values[3 * x] * _LEVEL
            g[i] = values[3 * x + 1] * _LEVEL
            b[i] = values[3 * x + 2] * _LEVEL


@_jit
def _affine(source, matrix, flip, planes, height, width):
    """Bilinear samples of source [3, H * W], zeros outside: a tap outside is read at the border with weight 0."""
    m0, m1, m2, m3, m4, m5 = matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5]
    for y in range(height):
        for x in range(width):
            from_x = m0 * np.float32(x) + m1 * np.float32(y) + m2
            from_y = m3 * np.float32(x) + m4 * np.float32(y) + m5
            left, right, weight_left, weight_right = _two_taps(from_x, width)
            above, below, weight_above, weight_below = _two_taps(from_y, height)
            place = y * width + (width - 1 - x if flip else x)
            for channel in range(3):
                values = source[channel]
                upper = weight_left * values[above * width + left] + weight_right * values[above * width + right]
                lower = weight_left * values[below * width + left] + weight_right * values[below * width + right]
                planes[channel, place] = weight_above * upper + weight_below * lower


@_jit
def _two_taps(position, size):
    """The two pixels around a position on an axis and their weights."""
    first = np.int32(np.floor(position))
    share = position - np.float32(first)
    weight_first = _ONE - share if 0 <= first < size else _ZERO
    weight_second = share if -1 <= first < size - 1 else _ZERO
    last = size - 1
    return min(max(first, 0), last), min(max(first + 1, 0), last), weight_first, weight_second


@_jit
def _jitter(r, g, b, order, factor):
    """The parts of colour jitter but contrast, in order; a neutral factor is skipped."""
    for place in range(order.size):
        op = order[place]
        if op == BRIGHTNESS and factor[op] != _ONE:
            _brightness(r, g, b, factor[op])
        elif op == SATURATION and factor[op] != _ONE:
            _saturation(r, g, b, factor[op])
        elif op == HUE and factor[op] != _ZERO:
            _hue(r, g, b, factor[op])


@_jit
def _clamp(x):
    return min(max(x, _ZERO), _ONE)


@_jit
def _grey(r, g, b):
    return _RED * r + _GREEN * g + _BLUE * b


@_jit
def _brightness(r, g, b, factor):
    for i in range(r.size):
        r[i] = min(r[i] * factor, _ONE)
        g[i] = min(g[i] * factor, _ONE)
        b[i] = min(b[i] * factor, _ONE)


@_jit
def _sum_grey(r, g, b):
    total = _ZERO
    for i in range(r.size):
        total += _grey(r[i], g[i], b[i])
    return total


@_jit
def _contrast(r, g, b, factor, grey_mean):
    offset = (_ONE - factor) * grey_mean
    for i in range(r.size):
        r[i] = _clamp(r[i] * factor + offset)
        g[i] = _clamp(g[i] * factor + offset)
        b[i] = _clamp(b[i] * factor + offset)


@_jit
def _saturation(r, g, b, factor):
    for i in range(r.size):
        offset = (_ONE - factor) * _grey(r[i], g[i], b[i])
        r[i] = _clamp(r[i] * factor + offset)
        g[i] = _clamp(g[i] * factor + offset)
        b[i] = _clamp(b[i] * factor + offset)


@_jit
def _hue(r, g, b, turns):
    """Rotate the hue at fixed saturation and value, without branches.

    With hue h in [0, 6) each channel of a colour is low + range * clamp(.), a trapezoid of h: torchvision's
    six cases in one formula (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative).
    """
    shift = _SIX * turns
    for i in range(r.size):
        red, green, blue = r[i], g[i], b[i]
        high, low = max(red, green, blue), min(red, green, blue)
        span = high - low
        difference = green - blue if high == red else (blue - red if high == green else red - green)
        sector = _ZERO if high == red else (_TWO if high == green else _FOUR)
        h = sector + difference / (span if span > _ZERO else _ONE) + shift  # in [-4, 8]
        h = h + _SIX if h < _ZERO else h
        h = h - _SIX if h >= _SIX else h
        r[i] = low + span * _clamp(abs(h - _THREE) - _ONE)
        g[i] = low + span * _clamp(_TWO - abs(h - _TWO))
        b[i] = low + span * _clamp(_TWO - abs(h - _FOUR))


@_jit
def _grayscale(r, g, b):
    for i in range(r.size):
        grey = _grey(r[i], g[i], b[i])
        r[i] = grey
        g[i] = grey
        b[i] = grey


@_jit
def _blur_weights(sigma, kernel_px, weights):
    """Half of a symmetric Gaussian into weights[0..radius]; returns the radius.

    torchvision's weights are exp(-i^2 / (2 sigma^2)), normalised over the kernel. Those past 6 sigma are below
    2e-8 together: left out.
    """
    radius = min(kernel_px // 2, int(6 * sigma) + 1)
    total = 0.0
    for i in range(radius + 1):
        weight = math.exp(-0.5 * (i / sigma) ** 2)
        weights[i] = weight
        total += weight if i == 0 else 2 * weight
    for i in range(radius + 1):
        weights[i] /= total
    return radius


@_jit
def _blur(plane, scratch, line, weights, radius):
    """Separable Gaussian with reflected borders of one plane [H, W], in place.

    scratch takes the H rows after the horizontal pass with `radius` reflected rows above and below:
    at most 3 H - 2 rows.
    """
    height, width = plane.shape
    for y in range(height):
        row = plane[y]
        for x in range(width):
            line[radius + x] = row[x]
        for i in range(1, radius + 1):
            line[radius - i] = row[i]
            line[radius + width - 1 + i] = row[width - 1 - i]
        _convolve(line, radius, 1, weights, radius, scratch[(y + radius) * width : (y + radius + 1) * width])
    first, last = radius * width, (radius + height - 1) * width
    for i in range(width, radius * width + 1, width):
        scratch[first - i : first - i + width] = scratch[first + i : first + i + width]
        scratch[last + i : last + i + width] = scratch[last - i : last - i + width]
    for y in range(height):
        _convolve(scratch, (y + radius) * width, width, weights, radius, plane[y])


@_jit
def _convolve(source, centre, stride, weights, radius, out):
    """out[x] = sum over |i| <= radius of weights[|i|] * source[centre + i * stride + x]."""
    middle, weight = source[centre:], weights[0]
    for x in range(out.size):
        out[x] = weight * middle[x]
    tap = 1
    while tap + 3 <= radius:  # four pairs at a time: a quarter of the traffic on out
        _add_four_pairs(source, centre, tap * stride, stride, weights[tap : tap + 4], out)
        tap += 4
    while tap <= radius:
        before, after, weight = source[centre - tap * stride :], source[centre + tap * stride :], weights[tap]
        for x in range(out.size):
            out[x] += weight * (before[x] + after[x])
        tap += 1


@_jit
def _add_four_pairs(source, centre, offset, stride, weights, out):
    a, b, c, d = weights[0], weights[1], weights[2], weights[3]
    before_a, after_a = source[centre - offset :], source[centre + offset :]
    before_b, after_b = source[centre - offset - stride :], source[centre + offset + stride :]
    before_c, after_c = source[centre - offset - 2 * stride :], source[centre + offset + 2 * stride :]
    before_d, after_d = source[centre - offset - 3 * stride :], source[centre + offset + 3 * stride :]
    for x in range(out.size):
        near = a * (before_a[x] + after_a[x]) + b * (before_b[x] + after_b[x])
        far = c * (before_c[x] + after_c[x]) + d * (before_d[x] + after_d[x])
        out[x] += near + far


@_jit
def _solarize(values, threshold):
    for i in range(values.size):
        values[i] = _ONE - values[i] if values[i] >= threshold else values[i]


@_jit
def _store(planes, scale, shift, out):
    """Planes [3, P] to interleaved, normalised pixels [P * 3]."""
    r, g, b = _piece(planes, 0, planes.shape[1])
    # Read once: numba cannot know that out does not overlap them.
    scale_r, scale_g, scale_b = scale[0], scale[1], scale[2]
    shift_r, shift_g, shift_b = shift[0], shift[1], shift[2]
    for i in range(r.size):
        out[3 * i] = r[i] * scale_r + shift_r
        out[3 * i + 1] = g[i] * scale_g + shift_g
        out[3 * i + 2] = b[i] * scale_b + shift_b
