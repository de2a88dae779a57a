"""The pixel op in numba: a view passes through all ops in pieces of about a thousand pixels, which stay in L1.

prange is not used: the decoding threads run numba code at the same time, and numba's workqueue layer does not support
concurrent parallel calls. Instead, the functions release the GIL and the samples are divided among plain threads.
Samples are independent, so the result does not depend on the number of threads.
The pointwise ops are compiled into the loops of kernels/augment/loops, which have the other ops.

The blur has two forms. In float32 it is torchvision's up to rounding. In 16-bit integers it is faster and differs from
the float32 form by at most .05 levels of 255; every other op is computed in float32 in either case. The integers are
used with AVX2 and for sigma up to 2 px, see `BLUR_DTYPE`.
"""

# B samples, Vg views of one size, H and W height and width in pixels, P = H * W, R the blur's radius in pixels

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
from numba import njit

from kernels.augment import loops, ops
from kernels.augment.loops.blur_float32 import blur_float32, blur_weights
from kernels.augment.loops.blur_int16 import MAX_INT16_RADIUS, MAX_INT16_SIGMA, blend_weights, blur_int16
from kernels.augment.loops.colour import adjust, after_blur, before_blur, gates, sum_grey
from kernels.augment.loops.layout import (
    BLOCK,
    FEATURES,
    JIT,
    LINE,
    ONE,
    PLANE,
    ZERO,
    borrow,
    keep,
    piece_px,
    whole_blocks,
    zeros_on_page,
)
from kernels.augment.loops.pixels import fence, load, normalise, prefetch, write
from kernels.augment.ops.jitter import CONTRAST
from kernels.augment.params import VIEW_PARAMS

_SHARES_PER_THREAD = 4  # blurred views take longer than others: smaller shares balance the load
_MIN_SHARE_PX = 2**18  # 0.6 ms of work: with smaller shares, the threads lose more time waiting for the GIL
_MIN_STREAMED_BYTES = 2**24  # a result of this size leaves the caches before it is read
_UNCHANGED = np.array([[1, 1, 1], [0, 0, 0]], np.float32)  # identity scale and shift

BlurDtype = Literal["int16", "float32"]
BLUR_DTYPE: BlurDtype = "int16" if "+avx2" in FEATURES else "float32"
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
            memory = np.empty(size + LINE, np.float32)
            first = -memory.ctypes.data // memory.itemsize % LINE
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
    is_streamed = width % LINE == 0 and out.nbytes >= _MIN_STREAMED_BYTES
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


@njit(**JIT, cache=True)  # contains all other functions, so that only this one is cached
def _augment_range(levels, params, size, normal, unchanged, out, is_int16, is_streamed, start, stop):
    """Process the views of samples start..stop-1, uint8 [B * Vg * P * 3], into out, float32 [Vg * B * P * 3].

    size is (H, W, largest radius); normal and unchanged each contain a row of scales and one of shifts, [2, 3 W] and
    [2, 3]. is_int16: the blur may use integers; is_streamed: the result bypasses the caches.
    """
    height, width, max_radius = size
    num_samples, num_views = params.shape
    num_values = 3 * height * width
    # The ring's 2 R + 1 rows, the blurred row, the padded row; each is padded to whole blocks.
    row_size = whole_blocks(3 * width)
    pieces = zeros_on_page((height * width // piece_px(width) + 1) * 3 * PLANE, np.float32)
    rows = np.zeros((2 * max_radius + 3) * row_size + 6 * max_radius, np.float32)
    weights = np.empty(max_radius + 1, np.float32)
    places = np.empty(2 * max_radius + 2, np.int64)
    int16_radius = min(max_radius, MAX_INT16_RADIUS)
    # The padded row and the ring, with three planes each; see blur_int16.
    steps = zeros_on_page((2 * int16_radius + 2) * 3 * whole_blocks(width) + 6 * BLOCK, np.int16)
    blends = np.zeros(int16_radius + 1, np.int16)
    blurred = zeros_on_page(3 * PLANE, np.float32)
    owned = (pieces, rows, weights, places, steps, blends, blurred)
    scratch = (
        borrow(pieces),
        borrow(rows),
        borrow(weights),
        borrow(places),
        borrow(steps),
        borrow(blends),
        borrow(blurred),
    )
    levels, out, normal, unchanged = borrow(levels), borrow(out), borrow(normal), borrow(unchanged)
    for sample in range(start, stop):
        for view in range(num_views):
            image = levels[(sample * num_views + view) * num_values :]
            target = out[(view * num_samples + sample) * num_values :]
            _augment_view(image, params[sample, view], size, scratch, normal, unchanged, is_int16, is_streamed, target)
    fence()
    keep(owned)


# numba's cache is keyed by this file's time and size alone; the code also depends on the ops and the loops.
_SOURCES = (
    Path(__file__),
    *(path for package in (ops, loops) for path in sorted(Path(package.__path__[0]).glob("*.py"))),
)
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
    px_per_piece = piece_px(width)
    radius = 0
    if record.blur_sigma > ZERO:
        radius = blur_weights(record.blur_sigma, min(record.blur_kernel_px // 2, max_radius), weights)
    is_int16 = is_int16 and record.blur_sigma <= MAX_INT16_SIGMA and radius <= MAX_INT16_RADIUS
    if is_int16:
        blend_weights(weights, radius, blends)
    if radius == 0 and not is_streamed and True not in gates(record):
        normalise(image, normal, 3 * width, 3 * num_px, out)
        return
    order, factor = record.jitter_order, record.jitter_factor
    num_parts = 4 if record.jitter else 0
    contrast_at = num_parts
    for place in range(num_parts):
        if order[place] == CONTRAST and factor[CONTRAST] != ONE:
            contrast_at = place
    grey_sum, grey_mean = 0.0, ZERO
    for is_output in range(0 if contrast_at < num_parts else 1, 2):
        for first in range(0, num_px, px_per_piece):
            num = min(px_per_piece, num_px - first)
            # Without contrast all pieces reuse the same buffer, which stays in L1.
            piece = pieces[first // px_per_piece * 3 * PLANE if contrast_at < num_parts else 0 :]
            begin, end = 0, num_parts if is_output else contrast_at
            if is_output and contrast_at < num_parts:
                begin = contrast_at
            else:
                if is_streamed:  # the levels of so large a batch are not in the caches either
                    prefetch(image, 3 * (first + px_per_piece), 3 * px_per_piece)
                load(image, record, height, width, first, num, piece)
            for place in range(begin, end):
                adjust(piece, num, order[place], factor[order[place]], grey_mean)
            if not is_output:
                grey_sum += sum_grey(piece, num)
                continue
            before_blur(piece, num, record)
            if radius == 0:
                after_blur(piece, num, record)
                write(piece, num, normal, is_streamed, out, 3 * first)
            elif is_int16:
                blur_int16(piece, first, num, size, radius, scratch, record, normal, is_streamed, out)
            else:
                blur_float32(piece, first, num, size, radius, scratch, record, normal, unchanged, out)
        grey_mean = np.float32(grey_sum / num_px)
