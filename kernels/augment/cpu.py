"""The pixel op in numba: a view passes through all ops in pieces of about a thousand pixels, which stay in L1.

prange is not used: the decoding threads run numba code at the same time, and numba's workqueue layer does not support
concurrent parallel calls. Instead, the functions release the GIL and the samples are divided among plain threads.
Samples are independent, so the result does not depend on the number of threads.
The pointwise ops are compiled into the loops; the other ops are loops of this file.

The blur has two forms. In float32 it is torchvision's up to rounding. In 16-bit integers it is faster and differs from
the float32 form by at most .05 levels of 255; every other op is computed in float32 in either case. The integers are
used with AVX2 and for sigma up to 2 px, see `BLUR_DTYPE`.
"""

# B samples, Vg views of one size, H and W height and width in pixels, P = H * W, R the blur's radius in pixels
# piece: float32 [3 * _PLANE], red, green and blue of up to _PIECE_PX pixels, each plane at a multiple of _PLANE
# row: float32 [3 W], interleaved red, green, blue
# steps: int16 [...], values of the integer blur, in 1/128 of a level of 255: 0..32640

import collections
import fcntl
import functools
import itertools
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kernels.augment import ops
from kernels.augment.ops.base import PointwiseOp
from kernels.augment.ops.jitter import BRIGHTNESS, CONTRAST, HUE, SATURATION
from kernels.augment.params import VIEW_PARAMS

# Reassociation lets LLVM vectorise the sums; no op divides by zero or produces a NaN or an infinity.
_JIT: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
_jit = njit(**_JIT)

_PIECE_PX = 1024  # three float32 planes of this size are 12 KiB, which fits in L1
# The distance between planes is constant, so that LLVM knows without a test that they do not overlap. It is a third of
# 4 KiB more than 4 KiB: a load waits for an earlier store, to whatever plane, if the lowest 12 bits of both addresses
# are equal, so that with a few bytes more than 4 KiB, a pixel of one plane waits for that before it of another.
_PLANE = _PIECE_PX + 21 * 16
_BLOCK = 32  # floats summed at once by the blur: four AVX2 registers; or integers of each colour: two
_DROPPED_WEIGHT = 2e-6  # see _blur_weights
_SHARES_PER_THREAD = 4  # blurred views take longer than others: smaller shares balance the load
_MIN_SHARE_PX = 2**18  # 0.6 ms of work: with smaller shares, the threads lose more time waiting for the GIL
_LINE_BYTES = 64  # of a cache
_LINE = _LINE_BYTES // 4  # floats
_PAGE_BYTES = 4096
_MIN_STREAMED_BYTES = 2**24  # a result of this size leaves the caches before it is read
_ZERO, _ONE, _TWO, _THREE, _FOUR, _SIX = (np.float32(x) for x in (0, 1, 2, 3, 4, 6))
_LEVEL = np.float32(1 / 255)
_MAX_INT16_SIGMA, _MAX_INT16_RADIUS = np.float32(2), 9  # see _blur_int16
_STEPS, _HALF = np.float32(255 * 128), np.float32(0.5)
_STEP = np.float32(_LEVEL / 128)  # exactly: a view of one level has the same floats blurred and not blurred
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's grey
_TARGET: Any = cpu_target.target_context
_FEATURES = _TARGET.codegen().magic_tuple()[2].split(",")  # part of the key of numba's cache
_UNCHANGED = np.array([[1, 1, 1], [0, 0, 0]], np.float32)  # identity scale and shift

BlurDtype = Literal["int16", "float32"]
BLUR_DTYPE: BlurDtype = "int16" if "+avx2" in _FEATURES else "float32"
"""The form of the blur on this CPU, for the instructions that numba compiles for (NUMBA_CPU_NAME=generic: float32)."""


class OutputPool:
    """Pool of result buffers for reuse: at 224 px, touching new pages takes a quarter of the pixel op's time.

    A buffer is reused only after the last tensor, slice or array that refers to it is dropped. At most two buffers, of
    one size, are kept for reuse.
    """

    def __init__(self) -> None:
        self._free: collections.deque[np.ndarray] = collections.deque(maxlen=2)

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an uninitialised float32 array of the given shape for one result, aligned to a cache line."""
        size = math.prod(shape)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or memory.size != size:
            self._free.clear()
            # numpy requests huge pages, torch does not: at 224 px, touching 4 KiB pages took longer than the ops.
            memory = np.empty(size + _LINE, np.float32)
            first = -memory.ctypes.data // memory.itemsize % _LINE
            memory = memory[first : first + size]
        out = memory.reshape(shape)
        weakref.finalize(out, self._free.append, memory).atexit = False
        return out


def augment_numba(
    views: np.ndarray,
    params: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    num_threads: int,
    outputs: OutputPool,
    blur_dtype: BlurDtype | None = None,
) -> np.ndarray:
    """Apply all ops to all views.

    Args:
        views, params, mean, std, num_threads, outputs: As in `augment`.
        blur_dtype: Arithmetic of the blur; None: BLUR_DTYPE. "int16" differs from "float32" by at most .05 levels of
            255 in [0, 1] units, before normalisation; it is used for sigma <= 2 px. Its result is the same on every
            CPU, for the same values before the blur.

    Returns:
        float32 [Vg, B, H, W, 3].
    """
    num_samples, num_views, height, width, _ = views.shape
    out = outputs.take((num_views, num_samples, height, width, 3))
    scale = 1 / np.asarray(std, np.float64)
    normal = np.tile((scale, -np.asarray(mean, np.float64) * scale), width).astype(np.float32)  # [2, 3 W]
    max_radius = min(int(params["blur_kernel_px"].max(initial=0)) // 2, height - 1, width - 1)
    levels = np.ascontiguousarray(views).reshape(-1)
    size = (height, width, max_radius)
    is_int16 = (blur_dtype or BLUR_DTYPE) == "int16"
    # Lines are written without being read first. Rows are whole lines, and an OutputPool's memory is aligned to them.
    is_streamed = width % _LINE == 0 and out.nbytes >= _MIN_STREAMED_BYTES
    arguments = (levels, np.ascontiguousarray(params), size, normal, _UNCHANGED, out.reshape(-1), is_int16, is_streamed)
    most_shares = views.size // (3 * _MIN_SHARE_PX)
    num_shares = min(_SHARES_PER_THREAD * num_threads, most_shares, num_samples) if num_threads > 1 else 1
    if num_shares <= 1:
        _augment_range(*arguments, 0, num_samples)
    else:
        edges = [num_samples * share // num_shares for share in range(num_shares + 1)]
        _run_shares(functools.partial(_augment_range, *arguments), edges, min(num_threads, num_shares))
    return out


@functools.cache
def compile_ahead() -> subprocess.Popen | None:
    """Start compiling the pixel op in another process, if its compiled code is not cached: 10 s on one core.

    Wait for the returned process to end before the first call here, which then finds the code in the cache. Another
    process is used for two reasons. First, the decoder's compilation takes as long, and numba compiles one function at
    a time per process. Second, code compiled in a process has given results whose last bits differ from those of the
    same code loaded from the cache (observed with affine views; the arithmetic is fastmath), so all processes should
    load it from the cache.
    """
    if _augment_range._cache._cache_file._load_index():  # pyright: ignore[reportAttributeAccessIssue]
        return None
    program = f"from {__name__} import compile_now; compile_now()"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a failure here is repeated, and reported, in this process
    )


def compile_now() -> None:
    """Compile the pixel op or load it from the cache; one process at a time, as several would overwrite its index."""
    folder = Path(_augment_range._cache.cache_path)  # pyright: ignore[reportAttributeAccessIssue]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "augment.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        augment_numba(
            np.zeros((1, 1, 8, 8, 3), np.uint8), np.zeros((1, 1), VIEW_PARAMS), (0,) * 3, (1,) * 3, 1, OutputPool()
        )


def _run_shares(augment_range: Callable[[int, int], Any], edges: list[int], num_threads: int) -> None:
    """Process every range between two edges, in this thread and num_threads - 1 others."""
    shares = iter(list(itertools.pairwise(edges)))  # the GIL gives each share to one thread

    def run() -> None:
        for first, stop in shares:
            augment_range(first, stop)

    jobs = [_pool(num_threads - 1).submit(run) for _ in range(num_threads - 1)]
    run()
    for job in jobs:
        if not job.cancel():  # a thread that has not started by now has nothing left to do
            job.result()


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="augment")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the object but not its threads


@njit(**_JIT, cache=True)  # contains all other functions, so that only this one is cached
def _augment_range(levels, params, size, normal, unchanged, out, is_int16, is_streamed, start, stop):
    """Process the views of samples start..stop-1, uint8 [B * Vg * P * 3], into out, float32 [Vg * B * P * 3].

    size is (H, W, largest radius); normal and unchanged each contain a row of scales and one of shifts, [2, 3 W] and
    [2, 3]. is_int16: the blur may use integers; is_streamed: the result bypasses the caches.
    """
    height, width, max_radius = size
    num_samples, num_views = params.shape
    num_values = 3 * height * width
    # The ring's 2 R + 1 rows, the blurred row, the padded row; each is padded to whole blocks.
    row_size = _whole_blocks(3 * width)
    pieces = _zeros_on_page((height * width // _piece_px(width) + 1) * 3 * _PLANE, np.float32)
    rows = np.zeros((2 * max_radius + 3) * row_size + 6 * max_radius, np.float32)
    weights = np.empty(max_radius + 1, np.float32)
    places = np.empty(2 * max_radius + 2, np.int64)
    int16_radius = min(max_radius, _MAX_INT16_RADIUS)
    # The padded row and the ring, with three planes each; see _blur_int16.
    steps = _zeros_on_page((2 * int16_radius + 2) * 3 * _whole_blocks(width) + 6 * _BLOCK, np.int16)
    blends = np.zeros(int16_radius + 1, np.int16)
    blurred = _zeros_on_page(3 * _PLANE, np.float32)
    owned = (pieces, rows, weights, places, steps, blends, blurred)
    scratch = (
        _borrow(pieces),
        _borrow(rows),
        _borrow(weights),
        _borrow(places),
        _borrow(steps),
        _borrow(blends),
        _borrow(blurred),
    )
    levels, out, normal, unchanged = _borrow(levels), _borrow(out), _borrow(normal), _borrow(unchanged)
    for sample in range(start, stop):
        for view in range(num_views):
            image = levels[(sample * num_views + view) * num_values :]
            target = out[(view * num_samples + sample) * num_values :]
            _augment_view(image, params[sample, view], size, scratch, normal, unchanged, is_int16, is_streamed, target)
    _fence()
    _keep(owned)


@_jit
def _zeros_on_page(num, dtype):
    """Zeros from the start of a page on. Whole cache lines from there are in one page each; an access to two pages at
    once makes the core wait: a blur whose padded row was in two pages took up to a quarter longer.
    """
    memory = np.zeros(num + _PAGE_BYTES, dtype)
    first = np.int64(-memory.ctypes.data % np.uint64(_PAGE_BYTES)) // memory.itemsize
    return memory[first : first + num]


def _declare_borrow(_: Any, array: Any) -> Any:
    """The array without its reference count, which numba otherwise changes, atomically, for every slice and call."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        borrowed = context.make_array(array)(context, builder, args[0])
        borrowed.meminfo = ir.Constant(borrowed.meminfo.type, None)
        borrowed.parent = ir.Constant(borrowed.parent.type, None)
        return borrowed._getvalue()

    return array(array), generate


def _declare_keep(_: Any, owned: Any) -> Any:
    """Keep borrowed arrays in memory up to here."""
    return types.none(owned), lambda context, *_: context.get_dummy_value()


_borrow: Any = intrinsic(_declare_borrow)
_keep: Any = intrinsic(_declare_keep)

# numba's cache is keyed by this file's time and size alone; the code also depends on the ops.
_SOURCES = (Path(__file__), *sorted(Path(ops.__file__).parent.glob("*.py")))
_augment_range._cache._cache_file._source_stamp = [  # pyright: ignore[reportAttributeAccessIssue]
    (path.name, path.stat().st_mtime, path.stat().st_size) for path in _SOURCES
]


@njit(inline="always")  # compiled only once, in its caller: a sixth less compile time
def _augment_view(image, record, size, scratch, normal, unchanged, is_int16, is_streamed, out):
    """Process one view, piece by piece. Contrast needs the mean grey of the view after the parts before it, so with
    contrast all pieces are first processed up to that point and stored.
    """
    height, width, max_radius = size
    pieces, _, weights, _, _, blends, _ = scratch
    num_px = height * width
    piece_px = _piece_px(width)
    radius = 0
    if record.blur_sigma > _ZERO:
        radius = _blur_weights(record.blur_sigma, min(record.blur_kernel_px // 2, max_radius), weights)
    is_int16 = is_int16 and record.blur_sigma <= _MAX_INT16_SIGMA and radius <= _MAX_INT16_RADIUS
    if is_int16:
        _blend_weights(weights, radius, blends)
    if radius == 0 and not is_streamed and True not in _gates(record):
        _normalise(image, normal, 3 * width, 3 * num_px, out)
        return
    order, factor = record.jitter_order, record.jitter_factor
    num_parts = 4 if record.jitter else 0
    contrast_at = num_parts
    for place in range(num_parts):
        if order[place] == CONTRAST and factor[CONTRAST] != _ONE:
            contrast_at = place
    grey_sum, grey_mean = 0.0, _ZERO
    for is_output in range(0 if contrast_at < num_parts else 1, 2):
        for first in range(0, num_px, piece_px):
            num = min(piece_px, num_px - first)
            # Without contrast all pieces reuse the same buffer, which stays in L1.
            piece = pieces[first // piece_px * 3 * _PLANE if contrast_at < num_parts else 0 :]
            begin, end = 0, num_parts if is_output else contrast_at
            if is_output and contrast_at < num_parts:
                begin = contrast_at
            else:
                if is_streamed:  # the levels of so large a batch are not in the caches either
                    _prefetch(image, 3 * (first + piece_px), 3 * piece_px)
                _load(image, record, height, width, first, num, piece)
            for place in range(begin, end):
                _adjust(piece, num, order[place], factor[order[place]], grey_mean)
            if not is_output:
                grey_sum += _sum_grey(piece, num)
                continue
            _before_blur(piece, num, record)
            if radius == 0:
                _after_blur(piece, num, record)
                _write(piece, num, normal, is_streamed, out, 3 * first)
            elif is_int16:
                _blur_int16(piece, first, num, size, radius, scratch, record, normal, is_streamed, out)
            else:
                _blur(piece, first, num, size, radius, scratch, record, normal, unchanged, out)
        grey_mean = np.float32(grey_sum / num_px)


@_jit
def _normalise(image, normal, row_size, num_values, out):
    """Process a view without ops: uint8 [P * 3] to normalised pixels."""
    for first in range(0, num_values, row_size):
        levels, row = image[first:], out[first:]
        for i in range(row_size):
            row[i] = levels[i] * _LEVEL * normal[0, i] + normal[1, i]


@_jit
def _prefetch(image, at, num):
    """Start to read num levels from image[at] on, those of the next piece, while this one is processed."""
    for i in range(at, at + num, _LINE_BYTES):
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


@_jit
def _load(image, record, height, width, first, num, piece):
    """Load pixels first..first + num - 1 of the view, after affine and flip, into the piece, in [0, 1]."""
    if record.affine:
        _load_affine(image, record.affine_matrix, record.flip, height, width, first, num, piece)
        return
    if not record.flip:
        levels = image[3 * first :]
        for i in range(num):
            piece[i] = levels[3 * i] * _LEVEL
            piece[i + _PLANE] = levels[3 * i + 1] * _LEVEL
            piece[i + 2 * _PLANE] = levels[3 * i + 2] * _LEVEL
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
            piece[j] = levels[3 * i] * _LEVEL
            piece[j + np.uint64(_PLANE)] = levels[3 * i + 1] * _LEVEL
            piece[j + np.uint64(2 * _PLANE)] = levels[3 * i + 2] * _LEVEL
        done += num_here


@_jit
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
            piece[i + channel * _PLANE] = (weight_above * upper + weight_below * lower) * _LEVEL


@_jit
def _two_taps(position, size):
    """The two pixels around a position on an axis and their weights."""
    first = np.int64(math.floor(position))
    share = position - np.float32(first)
    weight_first = _ONE - share if 0 <= first < size else _ZERO
    weight_second = share if -1 <= first < size - 1 else _ZERO
    last = size - 1
    return min(max(first, 0), last), min(max(first + 1, 0), last), weight_first, weight_second


@_jit
def _clamp(x, high):
    return min(max(x, _ZERO), high)


@_jit
def _grey(r, g, b):
    return _RED * r + _GREEN * g + _BLUE * b


@_jit
def _sum_grey(piece, num):
    total = _ZERO
    for i in range(num):
        total += _grey(piece[i], piece[i + _PLANE], piece[i + 2 * _PLANE])
    return total


@_jit
def _adjust(piece, num, op, factor, grey_mean):
    """Apply one part of colour jitter.

    Hue is shifted at fixed saturation and value, without branches or divisions. With hue h in [0, 6) each channel
    is low + span * clamp(.), a trapezoid of h: torchvision's six cases in one formula
    (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative); here `hue` is span * h.
    """
    if op == HUE:
        if factor == _ZERO:
            return
        # In [1, 7]: after adding h in [-1, 5], one wrap brings the sum back to [0, 6].
        red_at = _SIX * factor if _SIX * factor >= _ONE else _SIX * factor + _SIX
        for i in range(num):
            r, g, b = piece[i], piece[i + _PLANE], piece[i + 2 * _PLANE]
            high, low = max(r, g, b), min(r, g, b)
            span = high - low
            difference = g - b if high == r else (b - r if high == g else r - g)
            sector = red_at if high == r else (red_at + _TWO if high == g else red_at + _FOUR)
            hue = sector * span + difference
            hue = hue - _SIX * span if hue >= _SIX * span else hue
            piece[i] = low + _clamp(abs(hue - _THREE * span) - span, span)
            piece[i + _PLANE] = low + _clamp(_TWO * span - abs(hue - _TWO * span), span)
            piece[i + 2 * _PLANE] = low + _clamp(_TWO * span - abs(hue - _FOUR * span), span)
        return
    if factor == _ONE:
        return
    if op == SATURATION:
        for i in range(num):
            r, g, b = piece[i], piece[i + _PLANE], piece[i + 2 * _PLANE]
            offset = (_ONE - factor) * _grey(r, g, b)
            piece[i] = _clamp(r * factor + offset, _ONE)
            piece[i + _PLANE] = _clamp(g * factor + offset, _ONE)
            piece[i + 2 * _PLANE] = _clamp(b * factor + offset, _ONE)
        return
    offset = _ZERO if op == BRIGHTNESS else (_ONE - factor) * grey_mean
    for i in range(num):
        piece[i] = _clamp(piece[i] * factor + offset, _ONE)
        piece[i + _PLANE] = _clamp(piece[i + _PLANE] * factor + offset, _ONE)
        piece[i + 2 * _PLANE] = _clamp(piece[i + 2 * _PLANE] * factor + offset, _ONE)


@_jit
def _store(piece, begin, num, normal, out, at):
    """Normalise and interleave pixels begin..begin + num - 1 of the piece, and store them from out[at] on."""
    # Read once: LLVM does not know that out does not overlap them.
    scale_r, scale_g, scale_b = normal[0, 0], normal[0, 1], normal[0, 2]
    shift_r, shift_g, shift_b = normal[1, 0], normal[1, 1], normal[1, 2]
    source, target = piece[begin:], out[at:]
    for i in range(num):
        target[3 * i] = source[i] * scale_r + shift_r
        target[3 * i + 1] = source[i + _PLANE] * scale_g + shift_g
        target[3 * i + 2] = source[i + 2 * _PLANE] * scale_b + shift_b


@_jit
def _write(piece, num, normal, is_streamed, out, at):
    """Normalise and interleave the first `num` pixels of the piece, and write them from out[at] on."""
    if not is_streamed:
        _store(piece, 0, num, normal, out, at)
        return
    scales, shifts = (normal[0, 0], normal[0, 1], normal[0, 2]), (normal[1, 0], normal[1, 1], normal[1, 2])
    for i in range(0, num, _LINE):
        _stream(piece, i, scales, shifts, out, at + 3 * i)


def _declare_stream(_: Any, piece: Any, begin: Any, scales: Any, shifts: Any, out: Any, at: Any) -> Any:
    """`_store` for _LINE pixels: three cache lines, which are not read before they are written, as by a plain store.

    out[at] is at the start of a line. Lines go to memory while the next pixels are computed; collected in a buffer and
    written together, they would make the core wait for the memory.
    """
    line = ir.VectorType(ir.FloatType(), _LINE)

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
            return shuffle(first, first, [0] * _LINE)

        colours = []
        for colour in range(3):
            values = builder.load(line_at(piece, begin, colour * _PLANE), align=4)
            scaled = builder.fmul(values, of_colour(scales, colour), flags=("contract",))
            colours.append(builder.fadd(scaled, of_colour(shifts, colour), flags=("contract",)))
        red_green, blue = (shuffle(a, b, range(2 * _LINE)) for a, b in (colours[:2], colours[2:] * 2))
        for first in range(0, 3 * _LINE, _LINE):
            lanes = [i % 3 * _LINE + i // 3 for i in range(first, first + _LINE)]
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
_fence: Any = intrinsic(_declare_fence)


def _build_read(names: Sequence[str]) -> Any:
    """Compile a function from a record to the tuple of these fields."""
    if not names:
        return _jit(lambda record: ())
    read_others, name = _build_read(names[:-1]), names[-1]
    return _jit(lambda record: (*read_others(record), record[name]))


def _build_chain(chained: Sequence[PointwiseOp], step: int, to_next_channel: int) -> Any:
    """Compile a function that applies to `num` pixels the ops that are on, in order.

    numba does not loop over functions of different types: each op is called after those before it, by name.

    Args:
        chained: The ops.
        step: Distance between two pixels, in floats.
        to_next_channel: Distance between red, green and blue of a pixel, in floats.
    """
    if not chained:
        return _jit(lambda values, num, record: None)
    apply_others, op = _build_chain(chained[:-1], step, to_next_channel), chained[-1]
    apply, gate, read = _jit(op.on_cpu), op.gate, _build_read([param[0] for param in op.params[1:]])
    green, blue = to_next_channel, 2 * to_next_channel

    @_jit
    def chain(values, num, record):
        apply_others(values, num, record)
        if record[gate]:
            numbers = read(record)
            for i in range(0, step * num, step):
                r, g, b = apply(values[i], values[i + green], values[i + blue], *numbers)
                values[i], values[i + green], values[i + blue] = r, g, b

    return chain


_gates = _build_read([op.gate for op in ops.OPS if op not in (ops.CROP, ops.BLUR)])
_before_blur = _build_chain(ops.BEFORE_BLUR, 1, _PLANE)
_after_blur = _build_chain(ops.AFTER_BLUR, 1, _PLANE)
_after_blur_of_row = _build_chain(ops.AFTER_BLUR, 3, 1)


@_jit
def _blur_weights(sigma, max_radius, weights):
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


@_jit
def _piece_px(width):
    """Number of pixels per piece: whole rows, or part of a row that is too wide."""
    return _PIECE_PX // width * width if width < _PIECE_PX else _PIECE_PX


@_jit
def _whole_blocks(num_floats):
    return (num_floats + _BLOCK - 1) // _BLOCK * _BLOCK


@_jit
def _blur(piece, first, num, size, radius, scratch, record, normal, unchanged, out):
    """Blur pixels first..first + num - 1 of the view, from the piece, and write every row that is complete.

    Separable Gaussian with reflected borders. Each row is first blurred horizontally and stored in a ring buffer of the
    last 2 R + 1 rows. The row R above it is then blurred vertically from the ring.
    """
    height, width, _ = size
    _, rows, weights, places, _, _, _ = scratch
    row_size = _whole_blocks(3 * width)
    ring_size = 2 * radius + 1
    blurred = ring_size * row_size
    padded = blurred + row_size + 3 * radius
    done = 0
    while done < num:
        y = (first + done) // width
        x = first + done - y * width
        num_here = min(width - x, num - done)
        _store(piece, done, num_here, unchanged, rows, padded + 3 * x)
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
            _after_blur_of_row(source, width, record)
            for i in range(3 * width):
                target[i] = source[i] * normal[0, i] + normal[1, i]


@_jit
def _sum_taps(rows, places, weights, radius, to, num):
    """rows[to + i] = weights[0] * rows[places[0] + i] + the pairs of taps at equal distance, for i < num.

    Pair k is weights[k] * (rows[places[2 k - 1] + i] + rows[places[2 k] + i]), 1 <= k <= radius.
    """
    for block in range(0, num, _BLOCK):
        _sum_block(rows, places, weights, radius, block, to + block)


def _declare_sum_block(_: Any, rows: Any, places: Any, weights: Any, radius: Any, at: Any, to: Any) -> Any:
    """`_sum_taps` for at <= i < at + _BLOCK, written to rows[to...].

    In plain numba code the sums would be in memory, with a load and a store per tap; here they stay in registers.
    """
    block, lanes = ir.VectorType(ir.FloatType(), _BLOCK), ir.VectorType(ir.IntType(32), _BLOCK)

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


@_jit
def _blend_weights(weights, radius, blends):
    """Write to blends[0..R - 1] what `_blur_int16` multiplies by, from weights[0..R]; 32768 is 1."""
    outer = 0.0
    for i in range(radius - 1, -1, -1):
        outer += 2 * weights[i + 1]
        total = outer + (2 * weights[i] if i > 0 else weights[0])
        blends[i] = min(int(outer / total * 32768 + 0.5), 32767)


@_jit
def _store_steps(piece, begin, num, steps, at, plane):
    """Store pixels begin..begin + num - 1 of the piece as integers, red from steps[at] on, the next `plane` behind."""
    for colour in range(3):
        source, target = piece[colour * _PLANE + begin :], steps[at + colour * plane :]
        for i in range(num):
            target[i] = np.int16(_clamp(source[i], _ONE) * _STEPS + _HALF)


@_jit
def _blur_int16(piece, first, num, size, radius, scratch, record, normal, is_streamed, out):
    """`_blur` in 16-bit integers, with one plane for each colour.

    Along each axis, with m(i) the mean of the two taps at distance i and m(0) the pixel itself, the blur is computed
    from the outside to the inside: b = m(R), then b = m(i) + blends[i] * (b - m(i)) for i = R - 1 .. 0, where
    blends[i] is the share of the weights beyond i in those from i on. A view of one level remains exactly as it is, and
    nothing overflows. A rounding at distance i counts only by the weights beyond i: all of them together are .05 levels
    at most for sigma <= 2, which has R <= 9.
    """
    height, width, _ = size
    _, _, _, places, steps, blends, blurred = scratch
    plane = _whole_blocks(width)
    row_size, ring_size = 3 * plane, 2 * radius + 1
    # First, since taps are not aligned: up to 600 px, the padded row is in one page.
    padded, padded_plane = _BLOCK, plane + 2 * _BLOCK
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
        for block in range(0, plane, _BLOCK):
            _blend_to_steps(steps, places, blends, radius, block, padded_plane, steps, to + block, plane)
        for row in range(max(y - radius, 0), height if y == height - 1 else y - radius + 1):
            for i in range(radius + 1):
                below = height - 1 - abs(height - 1 - row - i)
                places[2 * i] = ring + abs(row - i) % ring_size * row_size
                places[2 * i + 1] = ring + below % ring_size * row_size
            for begin in range(0, width, _PIECE_PX):
                num_out = min(_PIECE_PX, width - begin)
                for block in range(0, num_out, _BLOCK):
                    _blend_to_floats(steps, places, blends, radius, begin + block, plane, blurred, block, _PLANE)
                _after_blur(blurred, num_out, record)
                _write(blurred, num_out, normal, is_streamed, out, 3 * (row * width + begin))


def _build_blend(is_float: bool) -> Any:
    """Build the blend of `_blur_int16` along one axis for _BLOCK pixels, in registers.

    (steps, places, blends, R, at, plane, out, to, out_plane): the two taps at distance i are at places[2 i] + at and
    places[2 i + 1] + at of steps. The result goes to out[to...], as steps or as floats in [0, 1]. The next colours are
    `plane` and `out_plane` behind.
    """
    shorts, ints, floats = (ir.VectorType(kind, _BLOCK) for kind in (ir.IntType(16), ir.IntType(32), ir.FloatType()))
    one = ir.Constant(ints, [1] * _BLOCK)

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
                    step = ir.Constant(floats, [float(_STEP)] * _BLOCK)
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

    if "+avx512bw" in _FEATURES:
        return call("llvm.x86.avx512.pmul.hr.sw.512", (a, b))
    ints = ir.VectorType(ir.IntType(32), _BLOCK)
    if "+avx2" in _FEATURES:
        halves = []
        for first in range(0, _BLOCK, 16):
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), list(range(first, first + 16)))
            halves.append(call("llvm.x86.avx2.pmul.hr.sw", [builder.shuffle_vector(x, x, lanes) for x in (a, b)]))
        return builder.shuffle_vector(*halves, ir.Constant(ints, list(range(_BLOCK))))
    product = builder.mul(builder.sext(a, ints), builder.sext(b, ints))
    rounded = builder.add(product, ir.Constant(ints, [1 << 14] * _BLOCK))
    return builder.trunc(builder.ashr(rounded, ir.Constant(ints, [15] * _BLOCK)), a.type)


_blend_to_steps, _blend_to_floats = _build_blend(is_float=False), _build_blend(is_float=True)
