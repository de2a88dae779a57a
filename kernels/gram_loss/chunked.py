"""The equations of gram_loss/terms.py by torch's matrix products: any device."""

import torch
from torch import Tensor


def add_rows(
    x: Tensor, view: int, own: list[int], first: Tensor, second: Tensor, linear: float, square: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    rows = x[view]
    pulls = rows @ second
    sums = square * torch.linalg.vecdot(rows, pulls) + linear * (rows @ first)
    pulls.mul_(2 * square).add_(first, alpha=linear)
    for other in (x[w] for w in own):
        s = torch.linalg.vecdot(rows, other)
        sums -= linear * s + square * s.square()
        pulls.addcmul_((linear + 2 * square * s)[:, None], other, value=-1)
    return sums, pulls
