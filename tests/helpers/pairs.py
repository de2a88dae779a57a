"""Shared by tests of losses over pairs: input rows, and the equations on the whole matrix with torch's autograd.

# V views of B samples, D width; [V B, V B] for all ordered pairs (i, k) of the V B rows; rows of view 0 first
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-300


def random_rows(num_views: int, num_samples: int, width: int, *, seed: int = 0) -> Tensor:
    """Random z [V, B, D] in fp64 with rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_views, num_samples, width, generator=generator, dtype=torch.float64)
    return z * (0.5 + torch.rand(num_views, num_samples, 1, generator=generator, dtype=torch.float64))


def clustered_rows(num_views: int, num_samples: int, width: int, *, seed: int = 0) -> Tensor:
    """Rows in eight tight clusters, like trained projections: many similarities are near 1."""
    centres = F.normalize(random_rows(1, 8, width, seed=seed + 1), dim=2)[0]
    near = centres[torch.arange(num_samples) % 8]
    return F.normalize(near + 0.1 * F.normalize(random_rows(num_views, num_samples, width, seed=seed), dim=2), dim=2)


def collapsed_rows(num_views: int, num_samples: int, width: int) -> Tensor:
    """Identical rows: every similarity is 1."""
    return random_rows(1, 1, width).expand(num_views, num_samples, width).clone()


def opposite_rows(num_views: int, num_samples: int, width: int) -> Tensor:
    """A row and its negative in alternation, also between views: similarities are 1 and -1, positives are -1."""
    signs = (-1.0) ** (torch.arange(num_views)[:, None] + torch.arange(num_samples))
    return random_rows(1, 1, width) * signs[..., None].double()


ROWS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": random_rows,
    "clustered": clustered_rows,
    "collapsed": collapsed_rows,
    "opposite": opposite_rows,
}


def similarities(z: Tensor) -> Tensor:
    """The similarities s of all ordered pairs of rows, [V B, V B]."""
    u = F.normalize(z, dim=2).flatten(0, 1)
    return u @ u.T


def is_negative(z: Tensor, topology: str, groups: Tensor | None = None) -> Tensor:
    """The mask of negative pairs: another sample, another group and, for `cross`, another view."""
    num_views, num_samples, _ = z.shape
    group = (torch.arange(num_samples) if groups is None else groups).repeat(num_views)
    view = torch.arange(num_views).repeat_interleave(num_samples)
    negative = group[:, None] != group
    return negative & (view[:, None] != view) if topology == "cross" else negative


def is_positive(z: Tensor) -> Tensor:
    """The mask of positive pairs: the same sample in two views."""
    num_views, num_samples, _ = z.shape
    row = torch.arange(num_views * num_samples)
    return (row[:, None] % num_samples == row % num_samples) & (row[:, None] != row)


def log_sums(logits: Tensor, counted: Tensor) -> Tensor:
    """log sum of e^logit over the counted columns of each row; without any, the log of a tiny number."""
    return torch.log((torch.exp(logits) * counted).sum(1).clamp_min(TINY))


def assert_same_with_grads(ours: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Assert that two functions have equal values and gradients for each input, to 1e-11."""
    results = []
    for function in (ours, expected):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)
