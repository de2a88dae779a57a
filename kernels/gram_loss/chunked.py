"""The equations of gram_loss/terms.py with torch's matrix products, for any device."""

import torch
from torch import Tensor


def add_rows(
    x: Tensor, view: int, own: list[int], first: Tensor, second: Tensor, c1: float, c2: float, pulls: Tensor | None
) -> Tensor:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    rows = x[view]
    product = torch.mm(rows, second) if pulls is None else torch.mm(rows, second, out=pulls)
    sums = c2 * torch.linalg.vecdot(rows, product) + c1 * (rows @ first)
    if pulls is not None:
        pulls.mul_(2 * c2).add_(first, alpha=c1)
    for other in (x[w] for w in own):
        s = torch.linalg.vecdot(rows, other)
        sums -= c1 * s + c2 * s.square()
        if pulls is not None:
            pulls.addcmul_((c1 + 2 * c2 * s)[:, None], other, value=-1)
    return sums
