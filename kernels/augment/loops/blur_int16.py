"""The blur in 16-bit integers, within .05 levels of 255 of the float32 form for sigma up to 2 px."""

# H and W height and width in pixels, R the blur's radius in pixels
# steps: int16 [...], values of the integer blur, in 1/128 of a level of 255: 0..32640

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.augment.loops.colour import after_blur, clamp
from kernels.augment.loops.layout import BLOCK, FEATURES, LEVEL, ONE, PIECE_PX, PLANE, jit, whole_blocks
from kernels.augment.loops.pixels import write

MAX_INT16_SIGMA, MAX_INT16_RADIUS = np.float32(2), 9  # see blur_int16
_STEPS, _HALF = np.float32(255 * 128), np.float32(0.5)
_STEP = np.float32(LEVEL / 128)  # exactly: a view of one level has the same floats blurred and not blurred


@jit
def blend_weights(weights, radius, blends):
    """Write to blends[0..R - 1] what `blur_int16` multiplies by, from weights[0..R]; 32768 is 1."""
    outer = 0.0
    for i in range(radius - 1, -1, -1):
        outer += 2 * weights[i + 1]
        total = outer + (2 * weights[i] if i > 0 else weights[0])
        blends[i] = min(int(outer / total * 32768 + 0.5), 32767)


@jit
def _store_steps(piece, begin, num, steps, at, plane):
    """Store pixels begin..begin + num - 1 of the piece as integers, red from steps[at] on, the next `plane` behind."""
    for colour in range(3):
        source, target = piece[colour * PLANE + begin :], steps[at + colour * plane :]
        for i in range(num):
            target[i] = np.int16(clamp(source[i], ONE) * _STEPS + _HALF)


@jit
def blur_int16(piece, first, num, size, radius, scratch, record, normal, is_streamed, out):
    """`blur_float32` in 16-bit integers, with one plane for each colour.

    Along each axis, with m(i) the mean of the two taps at distance i and m(0) the pixel itself, the blur is computed
    from the outside to the inside: b = m(R), then b = m(i) + blends[i] * (b - m(i)) for i = R - 1 .. 0, where
    blends[i] is the share of the weights beyond i in those from i on. A view of one level remains exactly as it is, and
    nothing overflows. A rounding at distance i counts only by the weights beyond i: all of them together are .05 levels
    at most for sigma <= 2, which has R <= 9.
    """
    height, width, _ = size
    _, _, _, places, steps, blends, blurred = scratch
    plane = whole_blocks(width)
    row_size, ring_size = 3 * plane, 2 * radius + 1
    # First, since taps are not aligned: up to 600 px, the padded row is in one page.
    padded, padded_plane = BLOCK, plane + 2 * BLOCK
    ring = 3 * padded_plane
    done = 0
    while done < num:
        y = (first + done) // width
        x = first + done - y * width
        num_here = min(width - x, num - done)
        _store_steps(piece, done, num_here, steps, padded + x, padded_plane)
        done += num_here
        if x + num_here < width:
            return
        for i in range(radius + 1):
            places[2 * i], places[2 * i + 1] = padded - i, padded + i
        for colour in range(3):
            left = padded + colour * padded_plane
            right = left + width - 1
            for i in range(1, radius + 1):
                steps[left - i], steps[right + i] = steps[left + i], steps[right - i]
        to = ring + y % ring_size * row_size
        for block in range(0, plane, BLOCK):
            _blend_to_steps(steps, places, blends, radius, block, padded_plane, steps, to + block, plane)
        for row in range(max(y - radius, 0), height if y == height - 1 else y - radius + 1):
            for i in range(radius + 1):
                below = height - 1 - abs(height - 1 - row - i)
                places[2 * i] = ring + abs(row - i) % ring_size * row_size
                places[2 * i + 1] = ring + below % ring_size * row_size
            for begin in range(0, width, PIECE_PX):
                num_out = min(PIECE_PX, width - begin)
                for block in range(0, num_out, BLOCK):
                    _blend_to_floats(steps, places, blends, radius, begin + block, plane, blurred, block, PLANE)
                after_blur(blurred, num_out, record)
                write(blurred, num_out, normal, is_streamed, out, 3 * (row * width + begin))


def _build_blend(is_float: bool) -> Any:
    """Build the blend of `blur_int16` along one axis for BLOCK pixels, in registers.

    (steps, places, blends, R, at, plane, out, to, out_plane): the two taps at distance i are at places[2 i] + at and
    places[2 i + 1] + at of steps. The result goes to out[to...], as steps or as floats in [0, 1]. The next colours are
    `plane` and `out_plane` behind.
    """
    shorts, ints, floats = (ir.VectorType(kind, BLOCK) for kind in (ir.IntType(16), ir.IntType(32), ir.FloatType()))
    one = ir.Constant(ints, [1] * BLOCK)

    def declare(
        _: Any, steps: Any, places: Any, blends: Any, radius: Any, at: Any, plane: Any, out: Any, to: Any, far: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            steps, places, blends, out = (
                context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 1, 2, 6)
            )
            radius, at, plane, _, to, out_plane = args[3:]
            index = at.type

            def place_of(array: Any, start: Any, step: Any, colour: int, kind: Any) -> Any:
                place = builder.gep(array, [builder.add(start, builder.mul(step, index(colour)))])
                return builder.bitcast(place, kind.as_pointer())

            def means(distance: Any) -> list[Any]:
                """The means of two taps, rounded up, of each colour: one instruction of AVX2."""
                pair = builder.shl(distance, index(1))
                starts = [builder.load(builder.gep(places, [builder.add(pair, index(i))])) for i in range(2)]
                found = []
                for colour in range(3):
                    taps = (
                        builder.load(place_of(steps, builder.add(start, at), plane, colour, shorts), align=2)
                        for start in starts
                    )
                    total = builder.add(builder.add(*(builder.zext(tap, ints) for tap in taps)), one)
                    found.append(builder.trunc(builder.lshr(total, one), shorts))
                return found

            values = [cgutils.alloca_once_value(builder, mean) for mean in means(radius)]
            with cgutils.for_range(builder, radius) as loop:
                i = builder.sub(builder.sub(radius, index(1)), loop.index)
                share = builder.load(builder.gep(blends, [i]))
                first = builder.insert_element(ir.Constant(shorts, ir.Undefined), share, ir.IntType(32)(0))
                share = builder.shuffle_vector(first, first, ir.Constant(ints, None))
                for value, mean in zip(values, means(i), strict=True):
                    product = _multiply_rounded(builder, builder.sub(builder.load(value), mean), share)
                    builder.store(builder.add(mean, product), value)
            for colour, value in enumerate(values):
                result, align = builder.load(value), 2
                if is_float:
                    step = ir.Constant(floats, [float(_STEP)] * BLOCK)
                    result, align = builder.fmul(builder.sitofp(builder.zext(result, ints), floats), step), 4
                builder.store(result, place_of(out, to, out_plane, colour, result.type), align=align)
            return context.get_dummy_value()

        number = types.intp
        return types.none(steps, places, blends, number, number, number, out, number, number), generate

    return intrinsic(declare)


def _multiply_rounded(builder: Any, a: Any, b: Any) -> Any:
    """(a * b + 2^14) >> 15 of vectors of 16-bit integers. LLVM does not find the instruction for it by itself."""

    def call(name: str, parts: Sequence[Any]) -> Any:
        kind = ir.FunctionType(parts[0].type, [parts[0].type] * 2)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), parts)

    if "+avx512bw" in FEATURES:
        return call("llvm.x86.avx512.pmul.hr.sw.512", (a, b))
    ints = ir.VectorType(ir.IntType(32), BLOCK)
    if "+avx2" in FEATURES:
        halves = []
        for first in range(0, BLOCK, 16):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), list(range(first, first + 16)))
            halves.append(call("llvm.x86.avx2.pmul.hr.sw", [builder.shuffle_vector(x, x, lanes) for x in (a, b)]))
        return builder.shuffle_vector(*halves, ir.Constant(ints, list(range(BLOCK))))
    product = builder.mul(builder.sext(a, ints), builder.sext(b, ints))
    rounded = builder.add(product, ir.Constant(ints, [1 << 14] * BLOCK))
    return builder.trunc(builder.ashr(rounded, ir.Constant(ints, [15] * BLOCK)), a.type)


_blend_to_steps, _blend_to_floats = _build_blend(is_float=False), _build_blend(is_float=True)
