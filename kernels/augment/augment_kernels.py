# type: ignore  (Triton's language is no Python to a type checker)
"""The Triton kernels of the pixel op; `kernels.augment.fused` calls them and says how they work.

# n of N views of H x W pixels; r, g, b in [0, 1], fp32, a block of pixels each; a record: FIELDS numbers of one view
"""

from types import FunctionType

import triton
import triton.language as tl

from kernels.augment import ops
from kernels.augment.ops import jitter

CONTRAST: tl.constexpr = tl.constexpr(jitter.CONTRAST)
SATURATION: tl.constexpr = tl.constexpr(jitter.SATURATION)
HUE: tl.constexpr = tl.constexpr(jitter.HUE)

# Offsets of the fields in a record; fused ops that are off have neutral values, pointwise ops a gate that is zero.
BOX: tl.constexpr = tl.constexpr(0)  # top, left, height, width
AFFINE: tl.constexpr = tl.constexpr(4)  # 1 or 0, then the matrix
FLIP: tl.constexpr = tl.constexpr(11)
ORDER: tl.constexpr = tl.constexpr(12)  # four op codes
FACTOR: tl.constexpr = tl.constexpr(16)  # four, by op code
CONTRAST_AT: tl.constexpr = tl.constexpr(20)  # its position in the order; 4: no contrast
RADIUS: tl.constexpr = tl.constexpr(21)  # of the blur, in pixels; 0: none
SIGMA: tl.constexpr = tl.constexpr(22)
POINTWISE: tl.constexpr = tl.constexpr(23)  # the params of each pointwise op
POINTWISE_PARAMS = [param[0] for op in (*ops.BEFORE_BLUR, *ops.AFTER_BLUR) for param in op.params]
FIELDS: tl.constexpr = tl.constexpr(23 + len(POINTWISE_PARAMS))

LEVEL: tl.constexpr = tl.constexpr(1 / 255)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds half to even


@triton.jit
def _grey(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _clamp(x, high):
    return tl.minimum(tl.maximum(x, 0.0), high)


@triton.jit
def _reflect(i, size):
    """Index i in (-size, 2 size - 1) mirrored about the first and the last index."""
    i = tl.abs(i)
    return size - 1 - tl.abs(size - 1 - i)


@triton.jit
def _tap(position, in_px, out_px, tap):
    """Input pixel `tap` of the triangle filter around an output pixel, and its weight, not normalised."""
    scale = in_px / out_px
    support = tl.maximum(scale, 1.0)
    centre = (position + 0.5) * scale
    i = tl.floor(centre - support + 0.5) + tap
    weight = tl.maximum(1.0 - tl.abs((i + 0.5 - centre) / support), 0.0)
    weight = tl.where((i >= 0) & (i < in_px), weight, 0.0)
    return _clamp(i, in_px - 1.0).to(tl.int32), weight


@triton.jit
def _levels(image, record, y, x, mask, width, size, taps_y, taps_x, STORED: tl.constexpr):
    """Levels 0..255 of pixels (y, x) of a view, or of a stored image's box cropped as by an engine: r, g, b."""
    if STORED:
        top = tl.load(record + BOX).to(tl.int32)
        left = tl.load(record + BOX + 1).to(tl.int32)
        box_height = tl.load(record + BOX + 2)
        box_width = tl.load(record + BOX + 3)
        r = tl.zeros(y.shape, tl.float32)
        g = tl.zeros(y.shape, tl.float32)
        b = tl.zeros(y.shape, tl.float32)
        weights_y = tl.zeros(y.shape, tl.float32)
        weights_x = tl.zeros(y.shape, tl.float32)
        for tap_y in range(taps_y):
            from_y, weight_y = _tap(y.to(tl.float32), box_height, size, tap_y)
            weights_y += weight_y
            row_r = tl.zeros(y.shape, tl.float32)
            row_g = tl.zeros(y.shape, tl.float32)
            row_b = tl.zeros(y.shape, tl.float32)
            weights_x = tl.zeros(y.shape, tl.float32)
            for tap_x in range(taps_x):
                from_x, weight_x = _tap(x.to(tl.float32), box_width, size, tap_x)
                weights_x += weight_x
                at = image + ((top + from_y) * width + left + from_x) * 3
                row_r += weight_x * tl.load(at, mask=mask, other=0).to(tl.float32)
                row_g += weight_x * tl.load(at + 1, mask=mask, other=0).to(tl.float32)
                row_b += weight_x * tl.load(at + 2, mask=mask, other=0).to(tl.float32)
            r += weight_y * row_r
            g += weight_y * row_g
            b += weight_y * row_b
        unit = 1.0 / tl.maximum(weights_y * weights_x, 1e-6)  # 0 where nothing is read
        r = (r * unit + ROUNDER) - ROUNDER
        g = (g * unit + ROUNDER) - ROUNDER
        b = (b * unit + ROUNDER) - ROUNDER
    else:
        at = image + (y * width + x) * 3
        r = tl.load(at, mask=mask, other=0).to(tl.float32)
        g = tl.load(at + 1, mask=mask, other=0).to(tl.float32)
        b = tl.load(at + 2, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _pixels(image, record, y, x, mask, height, width, image_width, taps_y, taps_x, STORED: tl.constexpr):
    """Pixels (y, x) of the view after affine and flip."""
    if tl.load(record + FLIP) != 0:
        x = width - 1 - x
    if tl.load(record + AFFINE) != 0:
        column, row = x.to(tl.float32), y.to(tl.float32)
        m = record + AFFINE + 1
        from_x = tl.load(m) * column + tl.load(m + 1) * row + tl.load(m + 2)
        from_y = tl.load(m + 3) * column + tl.load(m + 4) * row + tl.load(m + 5)
        first_x, first_y = tl.floor(from_x), tl.floor(from_y)
        share_x, share_y = from_x - first_x, from_y - first_y
        r = tl.zeros(y.shape, tl.float32)
        g = tl.zeros(y.shape, tl.float32)
        b = tl.zeros(y.shape, tl.float32)
        for corner in range(4):
            dy, dx = corner // 2, corner % 2
            tap_y, tap_x = first_y + dy, first_x + dx
            weight = tl.where(dy == 1, share_y, 1.0 - share_y) * tl.where(dx == 1, share_x, 1.0 - share_x)
            inside = (tap_y >= 0) & (tap_y < height) & (tap_x >= 0) & (tap_x < width)
            weight = tl.where(inside, weight, 0.0)
            at_y = _clamp(tap_y, height - 1.0).to(tl.int32)
            at_x = _clamp(tap_x, width - 1.0).to(tl.int32)
            r_tap, g_tap, b_tap = _levels(
                image, record, at_y, at_x, mask, image_width, width, taps_y, taps_x, STORED
            )  # fmt: skip
            r += weight * r_tap
            g += weight * g_tap
            b += weight * b_tap
    else:
        r, g, b = _levels(image, record, y, x, mask, image_width, width, taps_y, taps_x, STORED)
    return r * LEVEL, g * LEVEL, b * LEVEL


@triton.jit
def _saturate(r, g, b, factor):
    offset = (1.0 - factor) * _grey(r, g, b)
    return _clamp(r * factor + offset, 1.0), _clamp(g * factor + offset, 1.0), _clamp(b * factor + offset, 1.0)


@triton.jit
def _turn_hue(r, g, b, turns):
    """Shift the hue at fixed saturation and value; each channel is a trapezoid of the hue (loops/colour.py)."""
    high = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    span = high - low
    difference = tl.where(high == r, g - b, tl.where(high == g, b - r, r - g))
    sector = tl.where(high == r, 0.0, tl.where(high == g, 2.0, 4.0))
    red_at = tl.where(6.0 * turns >= 1.0, 6.0 * turns, 6.0 * turns + 6.0)
    hue = (red_at + sector) * span + difference
    hue = tl.where(hue >= 6.0 * span, hue - 6.0 * span, hue)
    r = low + _clamp(tl.abs(hue - 3.0 * span) - span, span)
    g = low + _clamp(2.0 * span - tl.abs(hue - 2.0 * span), span)
    b = low + _clamp(2.0 * span - tl.abs(hue - 4.0 * span), span)
    return r, g, b


@triton.jit
def _jitter(r, g, b, record, begin, end, grey_mean):
    """Apply parts begin..end - 1 of colour jitter in the drawn order."""
    for place in range(begin, end):
        op = tl.load(record + ORDER + place).to(tl.int32)
        factor = tl.load(record + FACTOR + op)
        if op == HUE:
            if factor != 0:
                r, g, b = _turn_hue(r, g, b, factor)
        elif factor != 1:
            if op == SATURATION:
                r, g, b = _saturate(r, g, b, factor)
            else:
                offset = tl.where(op == CONTRAST, (1.0 - factor) * grey_mean, 0.0)
                r = _clamp(r * factor + offset, 1.0)
                g = _clamp(g * factor + offset, 1.0)
                b = _clamp(b * factor + offset, 1.0)
    return r, g, b


@triton.jit
def _unchanged(r, g, b, _record):
    return r, g, b


def _chain(r, g, b, record):
    r, g, b = _apply_others(r, g, b, record)  # noqa: F821
    if tl.load(record + _GATE) != 0:  # noqa: F821
        r, g, b = _apply(r, g, b, record + _GATE + 1)  # noqa: F821
    return r, g, b


def _build_chain(chained):
    """A function that applies the ops that are on, in order.

    Triton finds functions only by name, so each op's call is a copy of `_chain` with names of its own.
    """
    if not chained:
        return _unchanged
    op = chained[-1]
    op.on_gpu.__globals__["tl"] = tl  # the file of an op does not import Triton
    gate = tl.constexpr(POINTWISE.value + POINTWISE_PARAMS.index(op.gate))
    names = {"_apply_others": _build_chain(chained[:-1]), "_apply": triton.jit(op.on_gpu), "_GATE": gate}
    chain = FunctionType(_chain.__code__, globals() | names)
    chain.__qualname__ = f"_chain_to_{op.name}"  # Triton identifies a function by its name
    return triton.jit(chain)


_before_blur = _build_chain(ops.BEFORE_BLUR)
_after_blur = _build_chain(ops.AFTER_BLUR)


@triton.jit
def _image_of(pixels, image_ids, sample, n, num_levels, STORED: tl.constexpr):
    if STORED:
        return pixels + tl.load(image_ids + sample).to(tl.int64) * num_levels
    return pixels + n.to(tl.int64) * num_levels


@triton.jit
def sum_grey(
    pixels, image_ids, records, sums, num_views, height, width, image_width, num_levels, taps_y, taps_x, chunk_px,
    NUM_FIELDS: tl.constexpr, STORED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, CHUNKS). Sums of the grey before contrast over each chunk of a view's pixels, fp32 [N, CHUNKS]."""
    n = tl.program_id(0)
    chunk = tl.program_id(1)
    record = records + n * NUM_FIELDS
    contrast_at = tl.load(record + CONTRAST_AT).to(tl.int32)
    if contrast_at < 4:
        image = _image_of(pixels, image_ids, n // num_views, n, num_levels, STORED)
        stop = tl.minimum((chunk + 1) * chunk_px, height * width)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(chunk * chunk_px, stop, BLOCK):
            p = start + tl.arange(0, BLOCK)
            mask = p < stop
            r, g, b = _pixels(
                image, record, p // width, p % width, mask, height, width, image_width, taps_y, taps_x, STORED
            )  # fmt: skip
            r, g, b = _jitter(r, g, b, record, 0, contrast_at, 0.0)
            total += tl.where(mask, _grey(r, g, b), 0.0)
        tl.store(sums + n * CHUNKS + chunk, tl.sum(total, 0))


@triton.jit
def _store(out, y, x, width, mask, r, g, b, record, scales, shifts):
    """Apply the ops after the blur, normalise, cast and store one view as three interleaved channels."""
    r, g, b = _after_blur(r, g, b, record)
    at = out + (y * width + x) * 3
    r = r * tl.load(scales) + tl.load(shifts)
    g = g * tl.load(scales + 1) + tl.load(shifts + 1)
    b = b * tl.load(scales + 2) + tl.load(shifts + 2)
    tl.store(at, r.to(out.dtype.element_ty), mask=mask)
    tl.store(at + 1, g.to(out.dtype.element_ty), mask=mask)
    tl.store(at + 2, b.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sum_taps(plane, at, step, index, size, radius, sigma, mask):
    """Gaussian of a plane along one axis: at + step * (index + i), the index reflected within size (0: not at all)."""
    total = tl.zeros(index.shape, tl.float32)
    weights = 0.0
    for i in range(-radius, radius + 1):
        distance = i / sigma
        weight = tl.exp(-0.5 * distance * distance)
        weights += weight
        tap = index + i
        tap = tl.where(size > 0, _reflect(tap, size), tap)
        total += weight * tl.load(plane + at + tap * step, mask=mask, other=0.0)
    return total / weights


@triton.jit
def augment_rows(
    pixels, image_ids, records, sums, scales, shifts, scratch, out,
    num_tasks, num_blocks, num_samples, num_views, height, width, image_width, num_levels, taps_y, taps_x,
    block_rows, plane_size,
    NUM_FIELDS: tl.constexpr, STORED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (programs): each processes every programs-th block of rows of all views, with six planes of scratch."""
    program = tl.program_id(0)
    made = scratch + program.to(tl.int64) * 6 * plane_size  # pixels as the blur takes them, three planes
    blurred = made + 3 * plane_size  # the same after the blur along rows
    for task in range(program, num_tasks, tl.num_programs(0)):
        n = task // num_blocks
        first_row = task % num_blocks * block_rows
        num_rows = tl.minimum(block_rows, height - first_row)
        record = records + n * NUM_FIELDS
        radius = tl.load(record + RADIUS).to(tl.int32)
        sigma = tl.load(record + SIGMA)
        image = _image_of(pixels, image_ids, n // num_views, n, num_levels, STORED)
        target = out + (n % num_views * num_samples + n // num_views).to(tl.int64) * (height * width * 3)
        grey_mean = 0.0
        if tl.load(record + CONTRAST_AT) < 4:
            grey_mean = tl.sum(tl.load(sums + n * CHUNKS + tl.arange(0, CHUNKS)), 0) / (height * width)

        num_made = (num_rows + 2 * radius) * width
        for start in range(0, num_made, BLOCK):
            p = start + tl.arange(0, BLOCK)
            mask = p < num_made
            y = _reflect(first_row - radius + p // width, height)
            y = tl.where(mask, y, 0)
            x = p % width
            r, g, b = _pixels(image, record, y, x, mask, height, width, image_width, taps_y, taps_x, STORED)
            r, g, b = _jitter(r, g, b, record, 0, 4, grey_mean)
            r, g, b = _before_blur(r, g, b, record)
            if radius == 0:
                _store(target, y, x, width, mask, r, g, b, record, scales, shifts)
            else:
                tl.store(made + p, r, mask=mask)
                tl.store(made + plane_size + p, g, mask=mask)
                tl.store(made + 2 * plane_size + p, b, mask=mask)
        if radius > 0:
            tl.debug_barrier()  # the program's other threads have written
            for start in range(0, num_made, BLOCK):
                p = start + tl.arange(0, BLOCK)
                mask = p < num_made
                row = p // width * width
                for channel in range(3):
                    plane = made + channel * plane_size
                    total = _sum_taps(plane, row, 1, p % width, width, radius, sigma, mask)
                    tl.store(blurred + channel * plane_size + p, total, mask=mask)
            tl.debug_barrier()
            for start in range(0, num_rows * width, BLOCK):
                p = start + tl.arange(0, BLOCK)
                mask = p < num_rows * width
                x = p % width
                row = p // width
                r = _sum_taps(blurred, x, width, row + radius, 0, radius, sigma, mask)
                g = _sum_taps(blurred + plane_size, x, width, row + radius, 0, radius, sigma, mask)
                b = _sum_taps(blurred + 2 * plane_size, x, width, row + radius, 0, radius, sigma, mask)
                _store(target, first_row + row, x, width, mask, r, g, b, record, scales, shifts)
            tl.debug_barrier()  # before the next block overwrites what others still read
