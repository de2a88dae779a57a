"""Sums over the pairs of a batch of a function of the similarity, without the matrix of pairs.

# m rows here, n columns (the global batch, rows included), D width of a projection
# s_ik = rows_i . columns_k,  t = inv_temperature = 1 / temperature
# the rows are one block [view a of m/2 samples; view b of the same], and columns[row_offset : row_offset + m]
# Neg(i): every column but row i itself and its partner, the other view of the same sample

    pair_sums       r_i = sum_{k in Neg(i)} f(s_ik)
    pair_sums_grad  d/d row_i of sum_j g_j r_j over all n columns j
                    = sum_{k in Neg(i)} (g_i + g_k) f'(s_ik) columns_k

The second takes each pair both as row i, column k and as row k, column i: f is symmetric, so the gradient of the
local rows is complete without any gradient from elsewhere.

| kind        | f(s)                               |
|-------------|------------------------------------|
| `exp`       | e^{t (s - 1)}, the shift keeps it in (0, 1] for unit rows |
| `softplus`  | log(1 + e^{t s})                   |
| `quadratic` | log 2 + t s / 2 + (t s)^2 / 8, an upper bound of softplus |
"""

import math

import torch
from torch import Tensor

from kernels.pair_loss import chunked, reference
from kernels.pair_loss.reference import KINDS, MAX_EXP_INV_TEMPERATURE, Impl, Kind

__all__ = ["KINDS", "MAX_EXP_INV_TEMPERATURE", "Impl", "Kind", "pair_sums", "pair_sums_grad"]

_IMPLEMENTATIONS = {"auto": chunked, "chunked": chunked, "reference": reference}


@torch.no_grad()
def pair_sums(
    rows: Tensor, columns: Tensor, *, kind: Kind, inv_temperature: float, row_offset: int = 0, impl: Impl = "auto"
) -> Tensor:
    """Sum f over the negatives of each row. Not differentiable: `pair_sums_grad` is its backward.

    Args:
        rows: Unit rows [m, D], m even: [view a; view b]; fp64, fp32, fp16 or bf16.
        columns: Unit rows [n, D] of the global batch, same dtype and device; holds the rows at `row_offset`.
        kind: Which f, see the table above.
        inv_temperature: t, > 0, dimensionless; at most MAX_EXP_INV_TEMPERATURE for `exp`.
        row_offset: Where the rows stand in the columns.
        impl: "reference" holds the [m, n] matrix, "chunked" one strip of it; "auto" picks.

    Returns:
        r [m], fp64 for fp64 inputs, else fp32 (the sums run in that precision under autocast, too).

    Raises:
        ValueError: Shapes, dtypes, the offset, the kind or the temperature do not fit.
    """
    _check(rows, columns, kind, inv_temperature, row_offset, impl)
    with torch.autocast(rows.device.type, enabled=False):
        return _IMPLEMENTATIONS[impl].pair_sums(_wide(rows), _wide(columns), kind, inv_temperature, row_offset)


@torch.no_grad()
def pair_sums_grad(
    rows: Tensor,
    columns: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    *,
    kind: Kind,
    inv_temperature: float,
    row_offset: int = 0,
    impl: Impl = "auto",
) -> Tensor:
    """Gradient of sum_j g_j r_j, all pairs of the global batch included, in the local rows.

    Args:
        rows: As in `pair_sums`.
        columns: As in `pair_sums`.
        grad_rows: g of the rows [m].
        grad_columns: g of the columns [n]; equals grad_rows at `row_offset`.
        kind: As in `pair_sums`.
        inv_temperature: As in `pair_sums`.
        row_offset: As in `pair_sums`.
        impl: As in `pair_sums`.

    Returns:
        [m, D], fp64 for fp64 rows, else fp32.

    Raises:
        ValueError: As in `pair_sums`, or the shape of a gradient does not fit.
    """
    _check(rows, columns, kind, inv_temperature, row_offset, impl)
    if grad_rows.shape != rows.shape[:1] or grad_columns.shape != columns.shape[:1]:
        raise ValueError(
            f"grad_rows and grad_columns must be [{len(rows)}] and [{len(columns)}],"
            f" got {list(grad_rows.shape)} and {list(grad_columns.shape)}"
        )
    dtype = _wide(rows).dtype
    with torch.autocast(rows.device.type, enabled=False):
        return _IMPLEMENTATIONS[impl].pair_sums_grad(
            _wide(rows),
            _wide(columns),
            grad_rows.to(dtype),
            grad_columns.to(dtype),
            kind,
            inv_temperature,
            row_offset,
        )


def _wide(x: Tensor) -> Tensor:
    """fp64 stays, everything else becomes fp32: a product rounded to bf16 is off by 4e-3, times 1/temperature."""
    return x if x.dtype == torch.float64 else x.float()


def _check(rows: Tensor, columns: Tensor, kind: str, inv_temperature: float, row_offset: int, impl: str) -> None:
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(f"rows and columns must be [m, D] and [n, D], got {list(rows.shape)}, {list(columns.shape)}")
    if rows.dtype != columns.dtype or not rows.is_floating_point():
        raise ValueError(f"rows and columns must have one floating dtype, got {rows.dtype} and {columns.dtype}")
    if len(rows) % 2:
        raise ValueError(f"rows must be [view a; view b], an even number, got {len(rows)}")
    if not 0 <= row_offset <= len(columns) - len(rows):
        raise ValueError(f"row_offset {row_offset}: {len(rows)} rows do not fit there into {len(columns)} columns")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not (math.isfinite(inv_temperature) and inv_temperature > 0):
        raise ValueError(f"inv_temperature must be finite and > 0, got {inv_temperature}")
    if kind == "exp" and inv_temperature > MAX_EXP_INV_TEMPERATURE:
        raise ValueError(f"inv_temperature must be <= {MAX_EXP_INV_TEMPERATURE:g} for exp, got {inv_temperature}")
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(_IMPLEMENTATIONS)}, got {impl!r}")
