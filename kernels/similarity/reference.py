"""The equations of similarity/__init__.py on the whole matrix of pairs: for tests and second derivatives."""

# rows [V, B, D], columns [Q, B, D]; m = V B, n = Q B

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.similarity import Kind, Side, Term
from kernels.similarity.rows import finish, normalize

__all__ = ["accumulate", "finish", "normalize"]


def accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    """See `kernels.similarity.Implementation`."""
    with torch.autocast(rows.u.device.type, enabled=False):
        _accumulate(rows, columns, term, own)


def _accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
    logits = rows.u.flatten(0, 1) @ columns.u.flatten(0, 1).T * term.inv_temperature + term.bias
    is_counted = _is_counted(rows, columns, own)
    values = _value(logits, term.kind) * is_counted
    slopes = _slope(logits, term.kind) * is_counted
    if rows.weights is not None and columns.weights is not None:
        slopes = slopes * (rows.weights.flatten()[:, None] + columns.weights.flatten())
    _add(rows, columns, values, slopes)
    if columns is not rows:
        _add(columns, rows, values.T, slopes.T)


def _add(side: Side, other: Side, values: Tensor, slopes: Tensor) -> None:
    shape = side.u.shape
    if side.sums is not None:
        side.sums += values.sum(1).view(shape[:2])
    if side.slopes is not None:
        side.slopes += slopes.sum(1).view(shape[:2])
    if side.pulls is not None:
        side.pulls += (slopes @ other.u.flatten(0, 1)).view(shape)


def _is_counted(rows: Side, columns: Side, own: int | None) -> Tensor:
    """False for excluded pairs: [m, n]."""
    (num_views, num_samples, _), num_blocks = rows.u.shape, len(columns.u)
    counted = torch.ones(num_views, num_samples, num_blocks, num_samples, dtype=torch.bool, device=rows.u.device)
    if own is not None:
        sample = torch.arange(num_samples, device=rows.u.device)
        counted[:, sample, own : own + num_views, sample] = False
    if rows.groups is not None and columns.groups is not None:
        counted &= rows.groups[:, :, None, None] != columns.groups
    return counted.flatten(2, 3).flatten(0, 1)


def _value(logits: Tensor, kind: Kind) -> Tensor:
    if kind == "exp":
        return logits.exp()
    if kind == "softplus":
        return -F.logsigmoid(-logits)  # F.softplus is linear above 20: an error of 2e-9
    return logits.square()


def _slope(logits: Tensor, kind: Kind) -> Tensor:
    if kind == "exp":
        return logits.exp()
    if kind == "softplus":
        return logits.sigmoid()
    return 2 * logits
