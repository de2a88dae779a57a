"""Pieces of a view and the memory that the loops share: its size and place, and arrays without reference counts."""

# piece: float32 [3 * PLANE], red, green and blue of up to PIECE_PX pixels, each plane at a multiple of PLANE

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# Reassociation lets LLVM vectorise the sums; no op divides by zero or produces a NaN or an infinity.
JIT: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}
jit = njit(**JIT)

PIECE_PX = 1024  # three float32 planes of this size are 12 KiB, which fits in L1
# The distance between planes is constant, so that LLVM knows without a test that they do not overlap. It is a third of
# 4 KiB more than 4 KiB: a load waits for an earlier store, to whatever plane, if the lowest 12 bits of both addresses
# are equal, so that with a few bytes more than 4 KiB, a pixel of one plane waits for that before it of another.
PLANE = PIECE_PX + 21 * 16
BLOCK = 32  # floats summed at once by the blur: four AVX2 registers; or integers of each colour: two
LINE_BYTES = 64  # of a cache
LINE = LINE_BYTES // 4  # floats
_PAGE_BYTES = 4096
ZERO, ONE = np.float32(0), np.float32(1)
LEVEL = np.float32(1 / 255)
_TARGET: Any = cpu_target.target_context
FEATURES = _TARGET.codegen().magic_tuple()[2].split(",")  # part of the key of numba's cache


@jit
def piece_px(width):
    """Number of pixels per piece: whole rows, or part of a row that is too wide."""
    return PIECE_PX // width * width if width < PIECE_PX else PIECE_PX


@jit
def whole_blocks(num_floats):
    return (num_floats + BLOCK - 1) // BLOCK * BLOCK


@jit
def zeros_on_page(num, dtype):
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


borrow: Any = intrinsic(_declare_borrow)
keep: Any = intrinsic(_declare_keep)
