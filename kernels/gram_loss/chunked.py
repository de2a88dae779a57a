"""The equations of gram_loss/terms.py with torch's matrix products, for any device."""

import torch
from torch import Tensor


def add_rows(
    x: Tensor,
    view: int,
    own: list[int],
    first: Tensor,
    second: Tensor,
    linear: float,
    square: float,
    pulls: Tensor | None,
) -> Tensor:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    rows = x[view]
    product = torch.mm(rows, second) if pulls is None else torch.mm(rows, second, out=pulls)
    sums = square * torch.linalg.vecdot(rows, product) + linear * (rows @ first)
    if pulls is not None:
        pulls.mul_(2 * square).add_(first, alpha=linear)
    for other in (x[w] for w in own):
        s = torch.linalg.vecdot(rows, other)
        sums -= linear * s + square * s.square()
        if pulls is not None:
            pulls.addcmul_((linear + 2 * square * s)[:, None], other, value=-1)
    return sums
