"""The sums of gram_loss/terms.py from the moments, without in-place operations. For tests, as is the sum over pairs."""

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
    sums = linear * (rows @ first) + square * ((rows @ second) * rows).sum(1)
    pulled = linear * first + 2 * square * (rows @ second)
    for other in (x[w] for w in own):
        s = (rows * other).sum(1)
        sums = sums - (linear * s + square * s**2)
        pulled = pulled - (linear + 2 * square * s)[:, None] * other
    if pulls is not None:
        pulls.copy_(pulled)
    return sums
