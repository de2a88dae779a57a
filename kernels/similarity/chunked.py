"""The equations of similarity/__init__.py, one tile of pairs at a time: any device, memory bounded, deterministic.

# a tile: R rows x C columns of one block each; only its similarities, its values and a scratch buffer are kept
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.similarity import Kind, Side, Term
from kernels.similarity.rows import finish, normalize
from kernels.similarity.spans import Span, span_pairs

__all__ = ["TILE_ROWS", "accumulate", "finish", "normalize"]

# Maximum R and C. CPU: up to three fp32 buffers of 4 MiB (512 is 20 % slower, 2048 uses more memory and is no faster).
# GPU: up to three buffers of 64 MiB, enough pairs to fill the device; not measured yet.
TILE_ROWS = {"cpu": 1024, "cuda": 4096}


def accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`."""
    symmetric = columns is rows
    needs_values = rows.sums is not None or columns.sums is not None
    needs_slopes = any(x is not None for side in (rows, columns) for x in (side.slopes, side.pulls))
    step = min(rows.u.shape[1], TILE_ROWS.get(rows.u.device.type, TILE_ROWS["cuda"]))
    buffers = _Buffers(rows.u, step**2)
    with torch.autocast(rows.u.device.type, enabled=False):
        for i, k in span_pairs(rows.u, columns.u, step, symmetric=symmetric):
            u_i, u_k = i.of(rows.u), k.of(columns.u)
            logits = torch.mm(u_i, u_k.T, out=buffers.take("logits", (len(u_i), len(u_k))))
            logits.mul_(term.inv_temperature).add_(term.bias)
            values, slopes = _values_and_slopes(logits, buffers, term.kind, needs_values, needs_slopes)
            excluded = _excluded(rows, columns, i, k, own)
            for x in (values, None if slopes is values else slopes):
                _exclude(x, excluded)
            # A tile of equal spans of one side contains each pair twice: its rows alone are complete.
            sides = ((rows, i, u_k, 1), (columns, k, u_i, 0))[: 1 if symmetric and i == k else 2]
            for side, span, _, dim in sides:
                if side.sums is not None and values is not None:
                    span.of(side.sums).add_(values.sum(dim))
            if slopes is None:
                continue
            if rows.weights is not None and columns.weights is not None:
                slopes.mul_(i.of(rows.weights)[:, None] + k.of(columns.weights))
            for side, span, other, dim in sides:
                if side.slopes is not None:
                    span.of(side.slopes).add_(slopes.sum(dim))
                if side.pulls is not None:
                    span.of(side.pulls).addmm_(slopes if dim else slopes.T, other)


class _Buffers:
    """A buffer of the size of the largest tile for each requested name, reused for all tiles."""

    def __init__(self, like: Tensor, num_elements: int) -> None:
        self._like, self._num_elements = like, num_elements
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        if name not in self._memory:
            self._memory[name] = self._like.new_empty(self._num_elements)
        return self._memory[name][: shape[0] * shape[1]].view(shape[0], shape[1])


def _excluded(rows: Side, columns: Side, i: Span, k: Span, own: int | None) -> Tensor | str | None:
    """The excluded pairs of a tile: "diagonal", a boolean mask [R, C], or None."""
    mask = None
    if rows.groups is not None and columns.groups is not None:
        mask = i.of(rows.groups)[:, None] == k.of(columns.groups)
    if own is not None and own <= k.block < own + len(rows.u) and i.rows == k.rows:
        if mask is None:
            return "diagonal"
        mask.fill_diagonal_(True)
    return mask


def _exclude(x: Tensor | None, excluded: Tensor | str | None) -> None:
    if x is None:
        return
    if isinstance(excluded, Tensor):
        x.masked_fill_(excluded, 0.0)
    elif excluded == "diagonal":
        x.fill_diagonal_(0.0)


def _values_and_slopes(
    logits: Tensor, buffers: _Buffers, kind: Kind, needs_values: bool, needs_slopes: bool
) -> tuple[Tensor | None, Tensor | None]:
    """f and f' of a tile, stored in the buffers, including that of the logits; `exp` returns the same tensor twice."""
    if kind == "exp":
        values = logits.exp_()
        return values, values
    if kind == "square":
        values = torch.square(logits, out=buffers.take("values", logits.shape)) if needs_values else None
        return values, logits.mul_(2)
    slopes = torch.sigmoid(logits, out=buffers.take("slopes", logits.shape)) if needs_slopes else None
    values = None
    if needs_values:  # max(l, 0) + log(1 + e^{-|l|}): no overflow
        values = torch.abs(logits, out=buffers.take("values", logits.shape))
        values = values.neg_().exp_().log1p_().add_(logits.clamp_(min=0))
    return values, slopes
