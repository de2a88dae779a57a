"""How the pairs of two sides are visited: pieces of their blocks, so that memory is bounded."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """Rows `rows` of block `block` of one side."""

    block: int
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """The part of x [Q, B, ...]."""
        return x[self.block, self.rows]


def span_pairs(rows: Tensor, columns: Tensor, step: int, *, symmetric: bool) -> Iterator[tuple[Span, Span]]:
    """Spans of at most `step` rows [V, B, D'] and columns [Q, B, D']; each pair of spans once if they are `symmetric`.

    The blocks of both sides are split at the same positions, so pairs of one sample are on the diagonal of two spans.
    """
    if symmetric:
        return itertools.combinations_with_replacement(_spans(rows, step), 2)
    return itertools.product(_spans(rows, step), _spans(columns, step))


def _spans(u: Tensor, step: int) -> list[Span]:
    num_blocks, num_samples, _ = u.shape
    starts = range(0, num_samples, step)
    return [Span(q, slice(s, min(s + step, num_samples))) for q in range(num_blocks) for s in starts]
