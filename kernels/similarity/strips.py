"""Rows more than 256 wide: f and f' of a strip of pairs by a Triton kernel, their product with u by torch.

# a strip: R rows of one block x C columns of one block; x = u_i . u_k + b log2(e), the exponent of e^l
# BLOCK_R, BLOCK_C: the tile of a program; STEP: how much of the width it multiplies at a time

A strip's slopes are fp16 operands of torch's product. Where they span more than fp16 holds (`exp` with a wide range,
weighted slopes, `square`), the kernel writes them in fp32, and they are scaled by a power of two for each row, and
again for each column where the columns are pulled as well.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.similarity import Side, Term
from kernels.similarity.epilogues import (
    KINDS,
    LN_2,
    LOG2_E,
    SOFTPLUS,
    SQUARE,
    TOP,
    ex2,
    softplus_each,
)

__all__ = ["accumulate_strips"]

INTERPRETED = triton.knobs.runtime.interpret
STRIP_BYTES = 128 * 2**20  # slopes of a strip at most, all forms of them together
# BLOCK_R, BLOCK_C, STEP, warps, stages. Without spills on sm_90; which is fastest is not measured yet.
CONFIG = (16, 16, 256, 4, 1) if INTERPRETED else (128, 128, 64, 8, 3)


class _Strip(NamedTuple):
    """Rows `rows` of block `block` of one side."""

    block: int
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        return x[self.block, self.rows]


def accumulate_strips(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`; u as `fused.normalize` gives it, accumulators fp32."""
    symmetric = columns is rows
    weighted = rows.weights is not None and columns.weights is not None
    scaled = weighted or term.kind == "square" or (term.kind == "exp" and term.wide_range)
    step = min(rows.u.shape[1], _strip_rows(scaled))
    scratch = _Scratch(rows.u, step, scaled)
    slope_unit = 2.0**-TOP.value if term.kind == "softplus" else 1.0
    pull_unit = slope_unit * (term.inv_temperature * LOG2_E.value).rsqrt()
    with torch.autocast(rows.u.device.type, enabled=False):
        for i, k in _strip_pairs(rows.u, columns.u, step, symmetric):
            # Blocks are cut alike: pairs of one sample stand on the diagonal of a strip, or nowhere.
            diagonal = own is not None and own <= k.block < own + len(rows.u) and i.rows == k.rows
            # Within its own strip a symmetric side has each pair twice, so its rows alone are complete.
            ways = [(rows, i, columns, k)] if symmetric and i == k else [(rows, i, columns, k), (columns, k, rows, i)]
            parts = _run(rows, i, columns, k, term, diagonal, [way[0] for way in ways], scratch)
            for (side, strip, other, other_strip), sums, slope_sums in zip(ways, *parts, strict=False):
                if side.sums is not None:
                    strip.of(side.sums).add_(sums.sum(0))
                if side.slopes is not None:
                    strip.of(side.slopes).add_(slope_sums.sum(0), alpha=slope_unit)
                if side.pulls is not None:
                    is_turned = side is not rows or strip is not i
                    _pull(strip.of(side.pulls), other_strip.of(other.u), scratch, is_turned, pull_unit)


def _strip_rows(scaled: bool) -> int:
    bytes_per_pair = 6 if scaled else 2
    return max(CONFIG[0], int((STRIP_BYTES / bytes_per_pair) ** 0.5) // CONFIG[0] * CONFIG[0])


def _strip_pairs(rows: Tensor, columns: Tensor, step: int, symmetric: bool) -> Iterator[tuple[_Strip, _Strip]]:
    if symmetric:
        return itertools.combinations_with_replacement(_strips(rows, step), 2)
    return itertools.product(_strips(rows, step), _strips(columns, step))


def _strips(u: Tensor, step: int) -> list[_Strip]:
    num_blocks, num_samples, _ = u.shape
    starts = range(0, num_samples, step)
    return [_Strip(q, slice(s, min(s + step, num_samples))) for q in range(num_blocks) for s in starts]


class _Scratch:
    """Memory for the slopes of a strip [R, C], used again for each.

    Attributes:
        slopes: As the kernel writes them.
        operand: fp16, of the product with u: the slopes themselves, or what they become when scaled.
    """

    def __init__(self, u: Tensor, step: int, scaled: bool) -> None:
        self.scaled = scaled
        self._dense = u.new_empty(step, -(-step // 8) * 8, dtype=torch.float32 if scaled else torch.float16)
        self._operand = torch.empty_like(self._dense, dtype=torch.float16) if scaled else self._dense
        self.slopes, self.operand = self._dense, self._operand

    def cut(self, num_rows: int, num_columns: int) -> None:
        self.slopes = self._dense[:num_rows, :num_columns]
        self.operand = self._operand[:num_rows, :num_columns]


def _run(
    rows: Side, i: _Strip, columns: Side, k: _Strip, term: Term, diagonal: bool, sides: list[Side], scratch: _Scratch
) -> tuple[list[Tensor], list[Tensor]]:
    """Slopes into the scratch memory; partial sums of values and of slopes, for the rows and for the columns."""
    block_r, block_c, step, num_warps, stages = CONFIG
    u_i, u_k = i.of(rows.u), k.of(columns.u)
    num_rows, num_columns, padded = len(u_i), len(u_k), u_i.shape[1]
    scratch.cut(num_rows, num_columns)
    grid = (triton.cdiv(num_rows, block_r), triton.cdiv(num_columns, block_c))
    wanted = [any(getattr(s, name) is not None for s in sides) for name in ("sums", "slopes", "pulls")]
    needs_groups = rows.groups is not None and columns.groups is not None
    needs_weights = rows.weights is not None and columns.weights is not None
    groups = [_dense(s.of(x)) if needs_groups and x is not None else None for s, x in ((i, rows.groups), (k, columns.groups))]
    weights = [_dense(s.of(x)) if needs_weights and x is not None else None for s, x in ((i, rows.weights), (k, columns.weights))]
    sums, slope_sums = (
        [u_i.new_empty(n, m, dtype=torch.float32) for n, m in ((grid[1], num_rows), (grid[0], num_columns))]
        if is_wanted else [None, None]
        for is_wanted in wanted[:2]
    )
    pair_strip[grid](
        _descriptor(u_i, block_r, step), _descriptor(u_k, block_c, step), term.inv_temperature, term.bias,
        *groups, *weights, scratch.slopes, scratch.slopes.stride(0), *sums, *slope_sums,
        num_rows, num_columns, padded, int(diagonal),
        KIND=KINDS[term.kind], WEIGHTED=needs_weights, GROUPS=needs_groups,
        SUMS=wanted[0], SLOPES=wanted[1], PULLS=wanted[2],
        BLOCK_R=block_r, BLOCK_C=block_c, STEP=step, INTERP=INTERPRETED, num_warps=num_warps, num_stages=stages,
    )  # fmt: skip
    return sums, slope_sums


def _pull(pulls: Tensor, u: Tensor, scratch: _Scratch, is_turned: bool, unit: Tensor) -> None:
    """pulls [R, D] += slopes [R, C] u [C, D'], or with the slopes turned."""
    slopes, operand = (scratch.slopes.T, scratch.operand.T) if is_turned else (scratch.slopes, scratch.operand)
    if scratch.scaled:
        largest = torch.linalg.vector_norm(slopes, ord=float("inf"), dim=1).clamp_min(1e-30)
        exponent = TOP.value - largest.log2().ceil()
        torch.mul(slopes, exponent.exp2()[:, None], out=operand)
        unit = unit * exponent.neg().exp2()[:, None]
    if u.is_cuda:
        product = torch.mm(operand, u, out_dtype=torch.float32)
    else:
        product = operand.float() @ u.float()
    pulls.addcmul_(product[:, : pulls.shape[1]], unit)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous()


def _descriptor(u: Tensor, block: int, step: int) -> TensorDescriptor:
    u = u if u.data_ptr() % 16 == 0 else u.clone()  # the copy engine wants 16 bytes
    return TensorDescriptor(u, list(u.shape), [u.shape[1], 1], [block, step])


@triton.jit
def pair_strip(
    rows, columns, inv_temperature, bias, row_groups, column_groups, row_weights, column_weights,
    slopes, slopes_stride, row_parts, column_parts, row_slope_parts, column_slope_parts,
    num_rows, num_columns, width, diagonal,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, GROUPS: tl.constexpr,
    SUMS: tl.constexpr, SLOPES: tl.constexpr, PULLS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr, INTERP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, tiles of columns).

    Writes slopes [R, C], those of `softplus` times 2^TOP, and for each tile the sums along its columns
    (row_parts [tiles of columns, R]) and along its rows (column_parts [tiles of rows, C]), to be added in order.
    diagonal: row i and column i of the strip are the same sample.
    """
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_row = i < num_rows
    is_column = k < num_columns
    x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for d in tl.range(0, width, STEP):
        u_i = rows.load([tl.program_id(0) * BLOCK_R, d])
        u_k = columns.load([tl.program_id(1) * BLOCK_C, d])
        if INTERP:
            u_i = u_i.to(tl.float32)
            u_k = u_k.to(tl.float32)
        x = tl.dot(u_i, tl.trans(u_k), x)

    t = tl.load(inv_temperature).to(tl.float32)
    b = tl.load(bias).to(tl.float32)
    excluded = ~(is_row[:, None] & is_column[None, :]) | ((diagonal != 0) & (i[:, None] == k[None, :]))
    if GROUPS:
        row_group = tl.load(row_groups + i, mask=is_row, other=0)
        column_group = tl.load(column_groups + k, mask=is_column, other=0)
        excluded |= row_group[:, None] == column_group[None, :]
    x = tl.where(excluded, 0.0 if KIND == SQUARE else float("-inf"), x + b * LOG2_E)
    if KIND == SOFTPLUS:
        values, g = softplus_each(x, INTERP)
        values *= LN_2
    elif KIND == SQUARE:
        values = x * x * (LN_2 * LN_2)
        g = x * (2 * LN_2)
    else:
        values = ex2(x, INTERP)
        g = values
    if WEIGHTED:
        row_weight = tl.load(row_weights + i, mask=is_row, other=0.0)
        column_weight = tl.load(column_weights + k, mask=is_column, other=0.0)
        g *= row_weight[:, None] + column_weight[None, :]

    row_at = tl.program_id(1) * num_rows + i
    column_at = tl.program_id(0) * num_columns + k
    if SUMS:
        tl.store(row_parts + row_at, tl.sum(values, 1), mask=is_row)
        tl.store(column_parts + column_at, tl.sum(values, 0), mask=is_column)
    if SLOPES:
        tl.store(row_slope_parts + row_at, tl.sum(g, 1), mask=is_row)
        tl.store(column_slope_parts + column_at, tl.sum(g, 0), mask=is_column)
    if PULLS:
        at = i.to(tl.int64)[:, None] * slopes_stride + k[None, :]
        tl.store(slopes + at, g.to(slopes.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
