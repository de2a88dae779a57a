"""The sums of gram_loss/terms.py from the moments, without in-place operations. For tests, as is the sum over pairs."""

from torch import Tensor


def add_rows(
    x: Tensor, view: int, own: list[int], first: Tensor, second: Tensor, c1: float, c2: float, pulls: Tensor | None
) -> Tensor:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    rows = x[view]
    sums = c1 * (rows @ first) + c2 * ((rows @ second) * rows).sum(1)
    pulled = c1 * first + 2 * c2 * (rows @ second)
    for other in (x[w] for w in own):
        s = (rows * other).sum(1)
        sums = sums - (c1 * s + c2 * s**2)
        pulled = pulled - (c1 + 2 * c2 * s)[:, None] * other
    if pulls is not None:
        pulls.copy_(pulled)
    return sums
