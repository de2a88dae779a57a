"""The blur's weights, and the blur in float32: torchvision's up to rounding."""

# H and W height and width in pixels, R the blur's radius in pixels
# row: float32 [3 W], interleaved red, green, blue

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.augment.loops.colour import after_blur_of_row
from kernels.augment.loops.layout import BLOCK, jit, whole_blocks
from kernels.augment.loops.pixels import store

_DROPPED_WEIGHT = 2e-6  # see blur_weights


@jit
def blur_weights(sigma, max_radius, weights):
    """Write half of a symmetric Gaussian to weights[0..R]; returns R.

    torchvision's weights are exp(-i^2 / (2 sigma^2)), normalised over the kernel. The outermost weights are dropped as
    long as their sum, as a fraction of the total, is below _DROPPED_WEIGHT, and the rest is normalised. Values in
    [0, 1] change by less than that per axis, 4e-6 in total, a thousandth of a level of 255. (R is about 4.8 sigma.)
    """
    total = 0.0
    for i in range(max_radius + 1):
        distance = i / sigma
        weight = math.exp(-0.5 * distance * distance)
        weights[i] = weight
        total += weight if i == 0 else 2 * weight
    radius, dropped = max_radius, 0.0
    while radius > 0 and dropped + 2 * weights[radius] < _DROPPED_WEIGHT * total:
        dropped += 2 * weights[radius]
        radius -= 1
    for i in range(radius + 1):
        weights[i] /= total - dropped
    return radius


@jit
def blur_float32(piece, first, num, size, radius, scratch, record, normal, unchanged, out):
    """Blur pixels first..first + num - 1 of the view, from the piece, and write every row that is complete.

    Separable Gaussian with reflected borders. Each row is first blurred horizontally and stored in a ring buffer of the
    last 2 R + 1 rows. The row R above it is then blurred vertically from the ring.
    """
    height, width, _ = size
    _, rows, weights, places, _, _, _ = scratch
    row_size = whole_blocks(3 * width)
    ring_size = 2 * radius + 1
    blurred = ring_size * row_size
    padded = blurred + row_size + 3 * radius
    done = 0
    while done < num:
        y = (first + done) // width
        x = first + done - y * width
        num_here = min(width - x, num - done)
        store(piece, done, num_here, unchanged, rows, padded + 3 * x)
        done += num_here
        if x + num_here < width:
            return
        last = padded + 3 * (width - 1)
        places[0] = padded
        for i in range(1, radius + 1):
            places[2 * i - 1], places[2 * i] = padded - 3 * i, padded + 3 * i
            for channel in range(3):
                rows[padded - 3 * i + channel] = rows[padded + 3 * i + channel]
                rows[last + 3 * i + channel] = rows[last - 3 * i + channel]
        _sum_taps(rows, places, weights, radius, y % ring_size * row_size, row_size)
        for row in range(max(y - radius, 0), height if y == height - 1 else y - radius + 1):
            places[0] = row % ring_size * row_size
            for i in range(1, radius + 1):
                below = height - 1 - abs(height - 1 - row - i)
                places[2 * i - 1], places[2 * i] = abs(row - i) % ring_size * row_size, below % ring_size * row_size
            _sum_taps(rows, places, weights, radius, blurred, row_size)
            source, target = rows[blurred:], out[3 * width * row :]
            after_blur_of_row(source, width, record)
            for i in range(3 * width):
                target[i] = source[i] * normal[0, i] + normal[1, i]


@jit
def _sum_taps(rows, places, weights, radius, to, num):
    """rows[to + i] = weights[0] * rows[places[0] + i] + the pairs of taps at equal distance, for i < num.

    Pair k is weights[k] * (rows[places[2 k - 1] + i] + rows[places[2 k] + i]), 1 <= k <= radius.
    """
    for block in range(0, num, BLOCK):
        _sum_block(rows, places, weights, radius, block, to + block)


def _declare_sum_block(_: Any, rows: Any, places: Any, weights: Any, radius: Any, at: Any, to: Any) -> Any:
    """`_sum_taps` for at <= i < at + BLOCK, written to rows[to...].

    In plain numba code the sums would be in memory, with a load and a store per tap; here they stay in registers.
    """
    block, lanes = ir.VectorType(ir.FloatType(), BLOCK), ir.VectorType(ir.IntType(32), BLOCK)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = zip(signature.args[:3], args[:3], strict=True)
        rows, places, weights = (context.make_array(kind)(context, builder, array).data for kind, array in arrays)
        radius, at, to = args[3:]
        zero, one = radius.type(0), radius.type(1)

        def block_at(index: Any) -> Any:
            return builder.bitcast(builder.gep(rows, [index]), block.as_pointer())

        def tap(index: Any) -> Any:
            place = builder.load(builder.gep(places, [index]))
            return builder.load(block_at(builder.add(place, at)), align=4)

        def weight(index: Any) -> Any:
            value = builder.load(builder.gep(weights, [index]))
            first = builder.insert_element(ir.Constant(block, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, first, ir.Constant(lanes, None))

        total = cgutils.alloca_once_value(builder, builder.fmul(weight(zero), tap(zero)))
        with cgutils.for_range(builder, radius) as loop:
            k = builder.add(loop.index, one)
            after = builder.shl(k, one)
            pair = builder.fadd(tap(builder.sub(after, one)), tap(after))
            product = builder.fmul(weight(k), pair, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        builder.store(builder.load(total), block_at(to), align=4)
        return context.get_dummy_value()

    return types.none(rows, places, weights, types.intp, types.intp, types.intp), generate


_sum_block: Any = intrinsic(_declare_sum_block)
