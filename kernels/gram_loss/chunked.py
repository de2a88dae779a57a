"""The equations of gram_loss/terms.py by torch's matrix products: any device."""

import torch
from torch import Tensor


def add_rows(
    x: Tensor, first: Tensor, second: Tensor, linear: float, square: float, own: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    pulls = x @ second
    sums = square * torch.linalg.vecdot(x, pulls) + linear * (x @ first)
    pulls.mul_(2 * square).add_(first, alpha=linear)
    for rows in own:
        s = torch.linalg.vecdot(x, rows)
        sums -= linear * s + square * s.square()
        pulls.addcmul_((linear + 2 * square * s)[:, None], rows, value=-1)
    return sums, pulls
