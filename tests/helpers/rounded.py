"""torch with the operands that the fused kernels have, rows and slopes in fp16, and everything else in fp32.

What the fused kernels are measured against: an implementation like `reference`, on the whole matrix of pairs. Its
products are torch's of fp16 operands into fp32, on a GPU those of the tensor cores. They add 16 products to a partial
sum at a time, each cut, not rounded, two bits below the last place of the largest, and then the sum at its last place
(Khattak and Mikaitis 2025, arXiv:2512.07004): 16 / 8 + 1 / 2 = 2.5 last places towards zero on average where all
have one sign. A sum over D = 256 is short by 1e-6 of itself, and e^l at l = 20 by 2e-5, at D = 768 by 7e-5, for
whoever multiplies there; with products in plain fp32 the comparison would find that and not the kernels' errors.
"""

# rows [V, B, D], columns [Q, B, D]; m = V B, n = Q B

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.similarity import Rows, Side, Term, fused, reference
from kernels.similarity.rows import finish
from kernels.similarity.rows import normalize as normalize_exactly

__all__ = ["accumulate", "finish", "largest_errors", "normalize"]

LARGEST = 2.0**15  # slopes of a row are scaled below it: sixteen powers of two then remain among fp16's normal numbers


# fp32 knows a slope e^x to |x| 2^-23 or so: one half way between two numbers of fp16 may be rounded either way, and
# where few pairs make up a row, that is most of its error.
NUDGES = (0.0, 2.0**-17, -(2.0**-17))
nudge = NUDGES[0]


def largest_errors(errors: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Errors of something that accumulates here, each the largest of rounding such slopes up, down and as they come."""
    found = []
    for x in NUDGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "nudge", x)
            found.append(errors())
    return {name: max(x[name] for x in found) for name in found[0]}


def normalize(z: Tensor, inv_temperature: Tensor) -> Rows:
    """torch's, but for u: the bits of the fused kernel, whose rounding has a test of its own."""
    return normalize_exactly(z, inv_temperature)._replace(u=fused.normalize(z, inv_temperature).u)


def accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`."""
    with torch.autocast(rows.u.device.type, enabled=False):
        logits = _product(rows.u.flatten(0, 1), columns.u.flatten(0, 1).T) * math.log(2) + term.bias
        is_counted = reference._is_counted(rows, columns, own)
        values = reference._value(logits, term.kind) * is_counted
        slopes = reference._slope(logits, term.kind) * is_counted
        if rows.weights is not None and columns.weights is not None:
            slopes *= rows.weights.flatten()[:, None] + columns.weights.flatten()
        length = (term.inv_temperature * math.log2(math.e)).sqrt()  # of u
        _add(rows, columns, values, slopes, length)
        if columns is not rows:
            _add(columns, rows, values.T, slopes.T, length)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[m, k] x [k, n] in fp16 -> fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add(side: Side, other: Side, values: Tensor, slopes: Tensor, length: Tensor) -> None:
    if side.sums is not None:
        side.sums += values.sum(1).view_as(side.sums)
    if side.slopes is not None:
        side.slopes += slopes.sum(1).view_as(side.slopes)
    if side.pulls is not None:
        scale = slopes.abs().amax(1, keepdim=True).clamp_min(1e-30).log2().ceil().exp2() / LARGEST
        operand = (slopes * (1 + nudge) / scale).half()
        pulls = scale / length * _product(operand, other.u.flatten(0, 1))[:, : side.pulls.shape[-1]]
        side.pulls += pulls.view_as(side.pulls)
