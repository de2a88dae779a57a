"""Pixels in and out: load levels into a piece, normalise a piece and write it to the result."""

# H and W height and width in pixels, P = H * W
# piece: float32 [3 * PLANE], red, green and blue of up to PIECE_PX pixels, each plane at a multiple of PLANE

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.augment.loops.layout import LEVEL, LINE, LINE_BYTES, ONE, PLANE, ZERO, jit


@jit
def normalise(image, normal, row_size, num_values, out):
    """Process a view without ops: uint8 [P * 3] to normalised pixels."""
    for first in range(0, num_values, row_size):
        levels, row = image[first:], out[first:]
        for i in range(row_size):
            row[i] = levels[i] * LEVEL * normal[0, i] + normal[1, i]


@jit
def prefetch(image, at, num):
    """Start to read num levels from image[at] on, those of the next piece, while this one is processed."""
    for i in range(at, at + num, LINE_BYTES):
        _prefetch_line(image, i)


def _declare_prefetch_line(_: Any, image: Any, at: Any) -> Any:
    """Read the cache line with image[at] into L2; at may be beyond the end."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(context.make_array(image)(context, builder, args[0]).data, [args[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        to_read, in_l2, of_data = number(0), number(2), number(1)
        builder.call(function, [place, to_read, in_l2, of_data])
        return context.get_dummy_value()

    return types.none(image, types.intp), generate


_prefetch_line: Any = intrinsic(_declare_prefetch_line)


@jit
def load(image, record, height, width, first, num, piece):
    """Load pixels first..first + num - 1 of the view, after affine and flip, into the piece, in [0, 1]."""
    if record.affine:
        _load_affine(image, record.affine_matrix, record.flip, height, width, first, num, piece)
        return
    if not record.flip:
        levels = image[3 * first :]
        for i in range(num):
            piece[i] = levels[3 * i] * LEVEL
            piece[i + PLANE] = levels[3 * i + 1] * LEVEL
            piece[i + 2 * PLANE] = levels[3 * i + 2] * LEVEL
        return
    done = 0
    while done < num:  # row by row, or part of a row if it is wider than a piece
        y = (first + done) // width
        x = first + done - y * width
        num_here = min(width - x, num - done)
        levels = image[3 * (y * width + width - x - num_here) :]
        for i in range(num_here):
            # Unsigned: numba's test for a negative index would prevent vectorisation.
            j = np.uint64(done + num_here - 1) - np.uint64(i)
            piece[j] = levels[3 * i] * LEVEL
            piece[j + np.uint64(PLANE)] = levels[3 * i + 1] * LEVEL
            piece[j + np.uint64(2 * PLANE)] = levels[3 * i + 2] * LEVEL
        done += num_here


@jit
def _load_affine(image, matrix, flip, height, width, first, num, piece):
    """Bilinear sampling of the view with zeros outside: a tap outside is read at the border with weight 0."""
    for i in range(num):
        y = (first + i) // width
        x = first + i - y * width
        x = width - 1 - x if flip else x
        from_x = matrix[0] * np.float32(x) + matrix[1] * np.float32(y) + matrix[2]
        from_y = matrix[3] * np.float32(x) + matrix[4] * np.float32(y) + matrix[5]
        left, right, weight_left, weight_right = _two_taps(from_x, width)
        above, below, weight_above, weight_below = _two_taps(from_y, height)
        above, below = above * width, below * width
        for channel in range(3):
            levels = image[channel:]
            upper = weight_left * levels[3 * (above + left)] + weight_right * levels[3 * (above + right)]
            lower = weight_left * levels[3 * (below + left)] + weight_right * levels[3 * (below + right)]
            piece[i + channel * PLANE] = (weight_above * upper + weight_below * lower) * LEVEL


@jit
def _two_taps(position, size):
    """The two pixels around a position on an axis and their weights."""
    first = np.int64(math.floor(position))
    share = position - np.float32(first)
    weight_first = ONE - share if 0 <= first < size else ZERO
    weight_second = share if -1 <= first < size - 1 else ZERO
    last = size - 1
    return min(max(first, 0), last), min(max(first + 1, 0), last), weight_first, weight_second


@jit
def store(piece, begin, num, normal, out, at):
    """Normalise and interleave pixels begin..begin + num - 1 of the piece, and store them from out[at] on."""
    # Read once: LLVM does not know that out does not overlap them.
    scale_r, scale_g, scale_b = normal[0, 0], normal[0, 1], normal[0, 2]
    shift_r, shift_g, shift_b = normal[1, 0], normal[1, 1], normal[1, 2]
    source, target = piece[begin:], out[at:]
    for i in range(num):
        target[3 * i] = source[i] * scale_r + shift_r
        target[3 * i + 1] = source[i + PLANE] * scale_g + shift_g
        target[3 * i + 2] = source[i + 2 * PLANE] * scale_b + shift_b


@jit
def write(piece, num, normal, is_streamed, out, at):
    """Normalise and interleave the first `num` pixels of the piece, and write them from out[at] on."""
    if not is_streamed:
        store(piece, 0, num, normal, out, at)
        return
    scales, shifts = (normal[0, 0], normal[0, 1], normal[0, 2]), (normal[1, 0], normal[1, 1], normal[1, 2])
    for i in range(0, num, LINE):
        _stream(piece, i, scales, shifts, out, at + 3 * i)


def _declare_stream(_: Any, piece: Any, begin: Any, scales: Any, shifts: Any, out: Any, at: Any) -> Any:
    """`store` for LINE pixels: three cache lines, which are not read before they are written, as by a plain store.

    out[at] is at the start of a line. Lines go to memory while the next pixels are computed; collected in a buffer and
    written together, they would make the core wait for the memory.
    """
    line = ir.VectorType(ir.FloatType(), LINE)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        piece, out = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4))
        _, begin, scales, shifts, _, at = args

        def shuffle(a: Any, b: Any, lanes: Sequence[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))

        def line_at(array: Any, start: Any, offset: int) -> Any:
            return builder.bitcast(builder.gep(array, [builder.add(start, start.type(offset))]), line.as_pointer())

        def of_colour(numbers: Any, colour: int) -> Any:
            number = builder.extract_value(numbers, colour)
            first = builder.insert_element(ir.Constant(line, ir.Undefined), number, ir.IntType(32)(0))
            return shuffle(first, first, [0] * LINE)

        colours = []
        for colour in range(3):
            values = builder.load(line_at(piece, begin, colour * PLANE), align=4)
            scaled = builder.fmul(values, of_colour(scales, colour), flags=("contract",))
            colours.append(builder.fadd(scaled, of_colour(shifts, colour), flags=("contract",)))
        red_green, blue = (shuffle(a, b, range(2 * LINE)) for a, b in (colours[:2], colours[2:] * 2))
        for first in range(0, 3 * LINE, LINE):
            lanes = [i % 3 * LINE + i // 3 for i in range(first, first + LINE)]
            written = builder.store(shuffle(red_green, blue, lanes), line_at(out, at, first), align=64)
            written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(piece, types.intp, scales, shifts, out, types.intp), generate


def _declare_fence(_: Any) -> Any:
    """Order streamed lines before what this thread does next, such as handing the result to another thread."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


_stream: Any = intrinsic(_declare_stream)
fence: Any = intrinsic(_declare_fence)
