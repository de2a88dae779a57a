"""Rows wider than 256: a Triton kernel computes f and f' of a strip of pairs, and torch their product with u.

# a strip: R rows of one block x C columns of one block, limited so that memory is bounded

A strip's slopes are fp16 operands of torch's product. If they exceed fp16's range (`exp` with a wide range, weighted
slopes, `square`), the kernel writes them in fp32. They are then scaled by a power of two per row, and again per column
if the columns have pulls too.
"""

from typing import Any, cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.similarity import Side, Term
from kernels.similarity.epilogues import INTERPRETED, KINDS, LOG2_E, TOP
from kernels.similarity.spans import Span, span_pairs
from kernels.similarity.strip_kernels import pair_strip

STRIP_BYTES = 128 * 2**20  # maximum size of a strip's slopes, all formats together
# BLOCK_R, BLOCK_C, STEP, warps, stages. No register spills on sm_90; which is fastest is not measured yet.
CONFIG = (16, 16, 256, 4, 1) if INTERPRETED else (128, 128, 64, 8, 3)
PART = 512  # a multiple of STEP


def accumulate_strips(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`; u from `fused.normalize`, accumulators fp32."""
    symmetric = columns is rows
    weighted = rows.weights is not None and columns.weights is not None
    scaled = weighted or term.kind == "square" or (term.kind == "exp" and term.wide_range)
    step = min(rows.u.shape[1], _strip_rows(scaled))
    has_pulls = rows.pulls is not None or columns.pulls is not None
    scratch = _Scratch(rows.u, step, scaled) if has_pulls else None
    slope_unit = 2.0**-TOP.value if term.kind == "softplus" else 1.0
    pull_unit = slope_unit * (term.inv_temperature * LOG2_E.value).rsqrt()
    with torch.autocast(rows.u.device.type, enabled=False):
        for i, k in span_pairs(rows.u, columns.u, step, symmetric=symmetric):
            diagonal = own is not None and own <= k.block < own + len(rows.u) and i.rows == k.rows
            sums, slope_sums = _run(rows, i, columns, k, term, diagonal, scratch)
            _add(rows, i, sums[0], slope_sums[0], slope_unit)
            if scratch is not None:
                _pull(rows, i, k.of(columns.u), scratch.slopes, scratch.operand, pull_unit)
            if symmetric and i == k:  # the strip contains each of these pairs twice: its rows alone are complete
                continue
            _add(columns, k, sums[1], slope_sums[1], slope_unit)
            if scratch is not None:
                _pull(columns, k, i.of(rows.u), scratch.slopes.T, scratch.operand.T, pull_unit)


def _strip_rows(scaled: bool) -> int:
    bytes_per_pair = 6 if scaled else 2
    return max(CONFIG[0], int((STRIP_BYTES / bytes_per_pair) ** 0.5) // CONFIG[0] * CONFIG[0])


class _Scratch:
    """Memory for the slopes of a strip [R, C], reused for all strips.

    Attributes:
        slopes: The slopes as written by the kernel.
        operand: fp16 operand of the product with u: the slopes themselves, or the scaled slopes.
    """

    def __init__(self, u: Tensor, step: int, scaled: bool) -> None:
        self._dense = u.new_empty(step, -(-step // 8) * 8, dtype=torch.float32 if scaled else torch.float16)
        self._operand = torch.empty_like(self._dense, dtype=torch.float16) if scaled else self._dense
        self.slopes, self.operand = self._dense, self._operand

    def cut(self, num_rows: int, num_columns: int) -> None:
        self.slopes = self._dense[:num_rows, :num_columns]
        self.operand = self._operand[:num_rows, :num_columns]


def _run(
    rows: Side, i: Span, columns: Side, k: Span, term: Term, diagonal: bool, scratch: _Scratch | None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Write the slopes to the scratch memory; return partial sums of values and of slopes for sides that need them."""
    block_r, block_c, step, num_warps, stages = CONFIG
    u_i, u_k = i.of(rows.u), k.of(columns.u)
    (num_rows, padded), num_columns = u_i.shape, len(u_k)
    if scratch is not None:
        scratch.cut(num_rows, num_columns)
    grid = (-(-num_rows // block_r), -(-num_columns // block_c))
    groups = _of_both((rows.groups, i), (columns.groups, k))
    weights = _of_both((rows.weights, i), (columns.weights, k))
    shapes = ((rows, (grid[1], num_rows)), (columns, (grid[0], num_columns)))
    sums, slope_sums = (
        [None if getattr(side, name) is None else u_i.new_empty(shape, dtype=torch.float32) for side, shape in shapes]
        for name in ("sums", "slopes")
    )
    cast(Any, pair_strip)[grid](
        _descriptor(u_i, block_r, step), _descriptor(u_k, block_c, step), term.bias,
        *groups, *weights, *((None, 0) if scratch is None else (scratch.slopes, scratch.slopes.stride(0))),
        *sums, *slope_sums,
        num_rows, num_columns, padded, int(diagonal),
        KIND=KINDS[term.kind], WEIGHTED=weights[0] is not None, GROUPS=groups[0] is not None,
        BLOCK_R=block_r, BLOCK_C=block_c, STEP=step, PART=PART, INTERP=INTERPRETED,
        num_warps=num_warps, num_stages=stages,
    )  # fmt: skip
    return sums, slope_sums


def _add(side: Side, strip: Span, sums: Tensor | None, slope_sums: Tensor | None, slope_unit: float) -> None:
    if side.sums is not None and sums is not None:
        strip.of(side.sums).add_(sums.sum(0))
    if side.slopes is not None and slope_sums is not None:
        strip.of(side.slopes).add_(slope_sums.sum(0), alpha=slope_unit)


def _pull(side: Side, strip: Span, u: Tensor, slopes: Tensor, operand: Tensor, unit: Tensor) -> None:
    """pulls [R, D] += slopes [R, C] u [C, D']; operand: memory for the slopes in fp16, or the slopes themselves."""
    if side.pulls is None:
        return
    if operand.dtype != slopes.dtype:
        largest = torch.linalg.vector_norm(slopes, ord=float("inf"), dim=1).clamp_min(1e-30)
        exponent = TOP.value - largest.log2().ceil()
        torch.mul(slopes, exponent.exp2()[:, None], out=operand)
        unit = unit * exponent.neg().exp2()[:, None]
    product = torch.mm(operand, u, out_dtype=torch.float32) if u.is_cuda else operand.float() @ u.float()
    pulls = strip.of(side.pulls)
    pulls.addcmul_(product[:, : pulls.shape[1]], unit)


def _of_both(*sides: tuple[Tensor | None, Span]) -> list[Tensor | None]:
    """Groups or weights of a strip on each side, made contiguous; None unless both sides have them."""
    cuts = [strip.of(x).contiguous() for x, strip in sides if x is not None]
    return [*cuts] if len(cuts) == len(sides) else [None for _ in sides]


def _descriptor(u: Tensor, block: int, step: int) -> TensorDescriptor:
    u = u if u.data_ptr() % 16 == 0 else u.clone()  # the copy engine requires 16-byte alignment
    return TensorDescriptor(u, list(u.shape), [u.shape[1], 1], [block, step])
