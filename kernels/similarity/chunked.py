"""The equations of similarity/__init__.py, one tile of pairs at a time: any device, memory bounded, deterministic.

# a tile: R rows x C columns of one block each; only its similarities, its values and a scratch buffer are kept
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.similarity import Kind, Side, Term
from kernels.similarity.rows import finish, normalize

__all__ = ["TILE_ROWS", "accumulate", "finish", "normalize"]

# Maximum R and C. CPU: up to three fp32 buffers of 4 MiB (512 is 20 % slower, 2048 uses more memory and is no faster).
# GPU: up to three buffers of 64 MiB, enough pairs to fill the device; not measured yet.
TILE_ROWS = {"cpu": 1024, "cuda": 4096}


class _Tile(NamedTuple):
    """Rows `rows` of block `block` of one side."""

    block: int
    rows: slice


def accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`."""
    symmetric = columns is rows
    needs_slopes = any(x is not None for side in (rows, columns) for x in (side.slopes, side.pulls))
    buffers = _Buffers(rows.u)
    with torch.autocast(rows.u.device.type, enabled=False):
        for i, k in _tile_pairs(rows.u, columns.u, symmetric):
            logits = buffers.take("logits", (i.rows.stop - i.rows.start, k.rows.stop - k.rows.start))
            torch.mm(rows.u[i.block, i.rows], columns.u[k.block, k.rows].T, out=logits)
            logits.mul_(term.inv_temperature).add_(term.bias)
            excluded = _excluded(rows, columns, i, k, own)
            needs_values = rows.sums is not None or columns.sums is not None
            values, slopes = _values_and_slopes(logits, buffers, term.kind, needs_values, needs_slopes)
            if values is not None:
                _exclude(values, excluded)
            if slopes is not None and slopes is not values:
                _exclude(slopes, excluded)
            if values is not None:
                _add_sums(rows.sums, i, values, 1)
                if not (symmetric and i == k):
                    _add_sums(columns.sums, k, values, 0)
            if slopes is None:
                continue
            if rows.weights is not None and columns.weights is not None:
                slopes.mul_(rows.weights[i.block, i.rows, None] + columns.weights[k.block, k.rows])
            _add_slopes(rows, i, slopes, columns.u[k.block, k.rows])
            if not (symmetric and i == k):
                _add_slopes(columns, k, slopes.T, rows.u[i.block, i.rows])


class _Buffers:
    """A buffer of the size of the largest tile for each requested name, reused for all tiles."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._num_elements = min(like.shape[1], _tile_rows(like)) ** 2
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        if name not in self._memory:
            self._memory[name] = self._like.new_empty(self._num_elements)
        return self._memory[name][: shape[0] * shape[1]].view(shape[0], shape[1])


def _tile_rows(u: Tensor) -> int:
    return TILE_ROWS.get(u.device.type, TILE_ROWS["cuda"])


def _tiles(u: Tensor) -> list[_Tile]:
    num_blocks, num_samples, _ = u.shape
    step = _tile_rows(u)
    starts = range(0, num_samples, step)
    return [_Tile(q, slice(s, min(s + step, num_samples))) for q in range(num_blocks) for s in starts]


def _tile_pairs(rows: Tensor, columns: Tensor, symmetric: bool) -> Iterator[tuple[_Tile, _Tile]]:
    if symmetric:
        return itertools.combinations_with_replacement(_tiles(rows), 2)
    return itertools.product(_tiles(rows), _tiles(columns))


def _excluded(rows: Side, columns: Side, i: _Tile, k: _Tile, own: int | None) -> Tensor | str | None:
    """The excluded pairs of a tile: "diagonal", a boolean mask [R, C], or None."""
    mask = None
    if rows.groups is not None and columns.groups is not None:
        mask = rows.groups[i.block, i.rows, None] == columns.groups[k.block, k.rows]
    # The blocks of both sides are split at the same positions, so pairs of one sample can only be on a tile's diagonal.
    if own is not None and own <= k.block < own + len(rows.u) and i.rows == k.rows:
        if mask is None:
            return "diagonal"
        mask.fill_diagonal_(True)
    return mask


def _exclude(x: Tensor, excluded: Tensor | str | None) -> None:
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


def _add_sums(sums: Tensor | None, tile: _Tile, values: Tensor, dim: int) -> None:
    if sums is not None:
        sums[tile.block, tile.rows] += values.sum(dim)


def _add_slopes(side: Side, tile: _Tile, slopes: Tensor, other: Tensor) -> None:
    if side.slopes is not None:
        side.slopes[tile.block, tile.rows] += slopes.sum(1)
    if side.pulls is not None:
        side.pulls[tile.block, tile.rows].addmm_(slopes, other)
