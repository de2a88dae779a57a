"""The equations of pair_loss/__init__.py, written out on the whole [m, n] matrix: for tests and small batches.

`pair_sums` is differentiable by autograd in rows and columns, which the tests use.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Impl = Literal["auto", "chunked", "reference"]
Kind = Literal["exp", "softplus", "quadratic"]
KINDS: tuple[str, ...] = get_args(Kind)

# e^{t (s - 1)} is smallest at s = -1. At t = 40 that is e^-80 = 1.8e-35, still a normal fp32 number (they end at
# 1.2e-38), so the log of a sum is finite whatever the rows; e^{t} = 2.4e17 leaves room for the unshifted mean.
MAX_EXP_INV_TEMPERATURE = 40.0


def excluded_columns(num_rows: int, row_offset: int, device: torch.device) -> Tensor:
    """Columns that are no negatives of each row, int64 [m, 2]: the row itself and its partner."""
    row = torch.arange(num_rows, device=device)
    return row_offset + torch.stack([row, (row + num_rows // 2) % num_rows], dim=1)


def pair_sums(rows: Tensor, columns: Tensor, kind: Kind, inv_temperature: float, row_offset: int) -> Tensor:
    """r_i = sum_{k in Neg(i)} f(s_ik): [m]."""
    values = _value(rows @ columns.T, kind, inv_temperature)
    return (values * _negatives(rows, columns, row_offset)).sum(1)


def pair_sums_grad(
    rows: Tensor,
    columns: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    kind: Kind,
    inv_temperature: float,
    row_offset: int,
) -> Tensor:
    """sum_{k in Neg(i)} (g_i + g_k) f'(s_ik) columns_k: [m, D]."""
    slopes = _slope(rows @ columns.T, kind, inv_temperature) * _negatives(rows, columns, row_offset)
    return ((grad_rows[:, None] + grad_columns) * slopes) @ columns


def _negatives(rows: Tensor, columns: Tensor, row_offset: int) -> Tensor:
    """1 where column k is in Neg(i), else 0: [m, n]."""
    mask = rows.new_ones(len(rows), len(columns))
    return mask.scatter_(1, excluded_columns(len(rows), row_offset, rows.device), 0.0)


def _value(s: Tensor, kind: Kind, t: float) -> Tensor:
    if kind == "exp":
        return torch.exp(t * (s - 1))
    if kind == "softplus":
        return -F.logsigmoid(-t * s)  # F.softplus is linear above 20: an error of 2e-9
    return math.log(2) + t * s / 2 + (t * s).square() / 8


def _slope(s: Tensor, kind: Kind, t: float) -> Tensor:
    if kind == "exp":
        return t * torch.exp(t * (s - 1))
    if kind == "softplus":
        return t * torch.sigmoid(t * s)
    return t * (0.5 + t * s / 4)
