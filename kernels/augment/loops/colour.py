"""Colour jitter, and the pointwise ops as loops over a piece."""

# piece: float32 [3 * PLANE], red, green and blue of up to PIECE_PX pixels, each plane at a multiple of PLANE
# row: float32 [3 W], interleaved red, green, blue

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.augment import ops
from kernels.augment.loops.layout import ONE, PLANE, ZERO, jit
from kernels.augment.ops.base import PointwiseOp
from kernels.augment.ops.jitter import BRIGHTNESS, HUE, SATURATION

_TWO, _THREE, _FOUR, _SIX = (np.float32(x) for x in (2, 3, 4, 6))
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's grey


@jit
def clamp(x, high):
    return min(max(x, ZERO), high)


@jit
def _grey(r, g, b):
    return _RED * r + _GREEN * g + _BLUE * b


@jit
def sum_grey(piece, num):
    total = ZERO
    for i in range(num):
        total += _grey(piece[i], piece[i + PLANE], piece[i + 2 * PLANE])
    return total


@jit
def adjust(piece, num, op, factor, grey_mean):
    """Apply one part of colour jitter.

    Hue is shifted at fixed saturation and value, without branches or divisions. With hue h in [0, 6) each channel
    is low + span * clamp(.), a trapezoid of h: torchvision's six cases in one formula
    (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative); here `hue` is span * h.
    """
    if op == HUE:
        if factor == ZERO:
            return
        # In [1, 7]: after adding h in [-1, 5], one wrap brings the sum back to [0, 6].
        red_at = _SIX * factor if _SIX * factor >= ONE else _SIX * factor + _SIX
        for i in range(num):
            r, g, b = piece[i], piece[i + PLANE], piece[i + 2 * PLANE]
            high, low = max(r, g, b), min(r, g, b)
            span = high - low
            difference = g - b if high == r else (b - r if high == g else r - g)
            sector = red_at if high == r else (red_at + _TWO if high == g else red_at + _FOUR)
            hue = sector * span + difference
            hue = hue - _SIX * span if hue >= _SIX * span else hue
            piece[i] = low + clamp(abs(hue - _THREE * span) - span, span)
            piece[i + PLANE] = low + clamp(_TWO * span - abs(hue - _TWO * span), span)
            piece[i + 2 * PLANE] = low + clamp(_TWO * span - abs(hue - _FOUR * span), span)
        return
    if factor == ONE:
        return
    if op == SATURATION:
        for i in range(num):
            r, g, b = piece[i], piece[i + PLANE], piece[i + 2 * PLANE]
            offset = (ONE - factor) * _grey(r, g, b)
            piece[i] = clamp(r * factor + offset, ONE)
            piece[i + PLANE] = clamp(g * factor + offset, ONE)
            piece[i + 2 * PLANE] = clamp(b * factor + offset, ONE)
        return
    offset = ZERO if op == BRIGHTNESS else (ONE - factor) * grey_mean
    for i in range(num):
        piece[i] = clamp(piece[i] * factor + offset, ONE)
        piece[i + PLANE] = clamp(piece[i + PLANE] * factor + offset, ONE)
        piece[i + 2 * PLANE] = clamp(piece[i + 2 * PLANE] * factor + offset, ONE)


def _build_read(names: Sequence[str]) -> Any:
    """Compile a function from a record to the tuple of these fields."""
    if not names:
        return jit(lambda record: ())
    read_others, name = _build_read(names[:-1]), names[-1]
    return jit(lambda record: (*read_others(record), record[name]))


def _build_chain(chained: Sequence[PointwiseOp], step: int, to_next_channel: int) -> Any:
    """Compile a function that applies to `num` pixels the ops that are on, in order.

    numba does not loop over functions of different types: each op is called after those before it, by name.

    Args:
        chained: The ops.
        step: Distance between two pixels, in floats.
        to_next_channel: Distance between red, green and blue of a pixel, in floats.
    """
    if not chained:
        return jit(lambda values, num, record: None)
    apply_others, op = _build_chain(chained[:-1], step, to_next_channel), chained[-1]
    apply, gate, read = jit(op.on_cpu), op.gate, _build_read([param[0] for param in op.params[1:]])
    green, blue = to_next_channel, 2 * to_next_channel

    @jit
    def chain(values, num, record):
        apply_others(values, num, record)
        if record[gate]:
            numbers = read(record)
            for i in range(0, step * num, step):
                r, g, b = apply(values[i], values[i + green], values[i + blue], *numbers)
                values[i], values[i + green], values[i + blue] = r, g, b

    return chain


gates = _build_read([op.gate for op in ops.OPS if op not in (ops.CROP, ops.BLUR)])
before_blur = _build_chain(ops.BEFORE_BLUR, 1, PLANE)
after_blur = _build_chain(ops.AFTER_BLUR, 1, PLANE)
after_blur_of_row = _build_chain(ops.AFTER_BLUR, 3, 1)
