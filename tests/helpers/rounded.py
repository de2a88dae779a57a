"""torch with the operands of the fused kernels: rows and slopes in fp16, and everything else in fp32.

The baseline for the fused kernels: an implementation like `reference`, on the whole matrix of pairs. Its matrix
products are torch's products of fp16 operands with fp32 results; on a GPU they use the tensor cores. Tensor cores add
16 products at a time to a partial sum. They truncate (not round) each product two bits below the last place of the
largest one, and then the sum at its last place (Khattak and Mikaitis 2025, arXiv:2512.07004). If all have the same
sign, this is 16 / 8 + 1 / 2 = 2.5 last places towards zero on average. A sum over D = 256 is too small by a relative
1e-6, and e^l at l = 20 by 2e-5, at D = 768 by 7e-5. Every program that uses tensor cores has this error. With products
in plain fp32, the comparison would measure this error and not the errors of the kernels.
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

LARGEST = 2.0**15  # slopes of a row are scaled below it: 2^-16 of it is still a normal fp16 number


# A slope e^x in fp32 has a relative error of about |x| 2^-23: a slope halfway between two fp16 numbers may be rounded
# up or down. If few pairs contribute to a row, this is most of its error.
NUDGES = (0.0, 2.0**-17, -(2.0**-17))
nudge = NUDGES[0]


def largest_errors(errors: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Errors of a function that uses `accumulate`: the largest over rounding halfway slopes up, down and unchanged."""
    found = []
    for x in NUDGES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "nudge", x)
            found.append(errors())
    return {name: max(x[name] for x in found) for name in found[0]}


def normalize(z: Tensor, inv_temperature: Tensor) -> Rows:
    """torch's `normalize`, except that u has the bits of the fused kernel, whose rounding has a separate test."""
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
        length = (term.inv_temperature * math.log2(math.e)).sqrt()  # length of u
        _add(rows, columns, values, slopes, length)
        if columns is not rows:
            _add(columns, rows, values.T, slopes.T, length)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product [m, k] x [k, n] of fp16 operands in fp32."""
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
