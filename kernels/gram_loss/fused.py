"""The equations of gram_loss/terms.py in one Triton kernel: sums and gradient of a row tile, fp32 by TF32 products."""

# x [V, B, D]; a program has BM rows of one view, and computes their product with M [D, D] BD columns at a time

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rows(
    x: Tensor, view: int, own: list[int], first: Tensor, second: Tensor, c1: float, c2: float, pulls: Tensor | None
) -> Tensor:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    num_views, num_rows, width = x.shape
    sums = x.new_empty(num_rows)
    block, num_warps = choose_config(width)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of the tensors
        cast(Any, _add_rows)[(triton.cdiv(num_rows, block),)](
            x, first.contiguous(), second.contiguous(), sums, pulls, c1, c2, view, num_rows, width,
            NUM_VIEWS=num_views, OWN=sum(1 << w for w in own), PULLS=pulls is not None, BM=block, BD=block,
            num_warps=num_warps,
        )  # fmt: skip
    return sums


def choose_config(width: int) -> tuple[int, int]:
    """Side of a tile and number of warps: no register spills on sm_90 (test_compile.py); speed not measured yet."""
    return (32, 4) if width <= 32 else (64, 8)


@triton.jit
def _add_rows(
    x_ptr,
    first_ptr,
    second_ptr,
    sums_ptr,
    pulls_ptr,
    linear,
    square,
    view,
    num_rows,
    width,
    NUM_VIEWS: tl.constexpr,
    OWN: tl.constexpr,  # bit w: the rows of view w are in the moments
    PULLS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.arange(0, BD)
    is_row = row < num_rows
    rows = x_ptr + (view * num_rows + row)[:, None] * width
    sums = tl.zeros((BM,), tl.float32)
    for w in tl.static_range(NUM_VIEWS):
        if (OWN >> w) & 1:
            s = _similarity(rows, x_ptr + (w * num_rows + row)[:, None] * width, is_row, column, width, BM, BD)
            sums -= linear * s + square * s * s
    for d in range(0, width, BD):
        inside = is_row[:, None] & (d + column < width)[None, :]
        product = tl.zeros((BM, BD), tl.float32)
        for k in range(0, width, BD):
            is_k = k + column < width
            x_k = tl.load(rows + (k + column)[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            second = second_ptr + (k + column).to(tl.int64)[:, None] * width + (d + column)[None, :]
            m_kd = tl.load(second, mask=is_k[:, None] & (d + column < width)[None, :], other=0.0)
            product = tl.dot(_to_tf32(x_k), _to_tf32(m_kd), product)
        first = tl.load(first_ptr + d + column, mask=d + column < width, other=0.0)
        x_d = tl.load(rows + (d + column)[None, :], mask=inside, other=0.0)
        sums += tl.sum(x_d * (square * product + linear * first[None, :]), 1)
        if PULLS:
            pulls = 2.0 * square * product + linear * first[None, :]
            for w in tl.static_range(NUM_VIEWS):
                if (OWN >> w) & 1:
                    others = x_ptr + (w * num_rows + row)[:, None] * width
                    s = _similarity(rows, others, is_row, column, width, BM, BD)
                    x_w = tl.load(others + (d + column)[None, :], mask=inside, other=0.0)
                    pulls -= (linear + 2.0 * square * s)[:, None] * x_w
            tl.store(pulls_ptr + row[:, None] * width + (d + column)[None, :], pulls, mask=inside)
    tl.store(sums_ptr + row, sums, mask=is_row)


@triton.jit
def _to_tf32(x):
    """fp32 rounded to the nearest TF32, ties away from zero; NaN is kept.

    The tensor cores would truncate the last 13 bits, which makes every factor too small, and every sum of squares too.
    """
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def _similarity(rows, others, is_row, column, width, BM: tl.constexpr, BD: tl.constexpr):
    """x_i . x_w,i in fp32: [BM]."""
    s = tl.zeros((BM,), tl.float32)
    for k in range(0, width, BD):
        mask = is_row[:, None] & (k + column < width)[None, :]
        a = tl.load(rows + (k + column)[None, :], mask=mask, other=0.0)
        b = tl.load(others + (k + column)[None, :], mask=mask, other=0.0)
        s += tl.sum(a * b, 1)
    return s
