"""The sums of gram_loss/terms.py, from the moments, without in-place work: for tests, beside the sum over pairs."""

from torch import Tensor


def add_rows(
    x: Tensor, first: Tensor, second: Tensor, linear: float, square: float, own: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """See `kernels.gram_loss.terms.GramImplementation`."""
    sums = linear * (x @ first) + square * ((x @ second) * x).sum(1)
    pulls = linear * first + 2 * square * (x @ second)
    for rows in own:
        s = (x * rows).sum(1)
        sums = sums - (linear * s + square * s**2)
        pulls = pulls - (linear + 2 * square * s)[:, None] * rows
    return sums, pulls
