"""`normalize` and `finish` in torch, for `chunked` and `reference`: fp32, or fp64 for fp64 rows."""

# V views of B samples, D width

import itertools

import torch
from torch import Tensor

from kernels.similarity import Rows

EPS = 1e-12  # as in torch.nn.functional.normalize: rows with a smaller norm are divided by EPS


def normalize(z: Tensor, inv_temperature: Tensor) -> Rows:
    """See `kernels.similarity.Implementation`."""
    del inv_temperature  # these implementations multiply the similarities by it later
    wide = widen(z)
    inv_norm = torch.linalg.vector_norm(wide, dim=2).clamp_min(EPS).reciprocal()
    u = _unit(z, wide, inv_norm)
    positives = [_dot(u[v], u[w]) for v, w in view_pairs(len(z))]
    return Rows(u.contiguous(), inv_norm, torch.stack(positives) if positives else inv_norm.new_empty(0, z.shape[1]))


def finish(
    z: Tensor, inv_norm: Tensor, pulls: Tensor, pull_scale: Tensor, positive_grads: Tensor
) -> tuple[Tensor, Tensor]:
    """See `kernels.similarity.Implementation`."""
    u = _unit(z, widen(z), inv_norm)
    dots = _dot(u, pulls)
    du = pulls * pull_scale
    add_positives(du, u, positive_grads)
    radial = _dot(u, du)
    du.addcmul_(radial[..., None], u, value=-1).mul_(inv_norm[..., None])
    return du.to(z.dtype), dots


def add_positives(dx: Tensor, x: Tensor, positive_grads: Tensor) -> None:
    """Add to dx [V, B, D] the gradient of the inner products of the positive pairs, ordered as in `Rows`."""
    for (v, w), grads in zip(view_pairs(len(x)), positive_grads, strict=True):
        dx[v].addcmul_(grads[:, None], x[w])
        dx[w].addcmul_(grads[:, None], x[v])


def _unit(z: Tensor, wide: Tensor, inv_norm: Tensor) -> Tensor:
    """u, computed in place in the widened z if that is a copy that autograd does not need."""
    inv_norm = inv_norm[..., None]
    return wide * inv_norm if wide.dtype == z.dtype or wide.requires_grad else wide.mul_(inv_norm)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, [V, B]; also under autocast, which would round the inputs of vecdot."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.linalg.vecdot(x, y)


def view_pairs(num_views: int) -> list[tuple[int, int]]:
    """The pairs (v, w) of views with v < w, in the order of `Rows.positives`."""
    return list(itertools.combinations(range(num_views), 2))


def wide_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: a product rounded to bf16 has an error of 4e-3, times 1/temperature."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """Convert to `wide_dtype`."""
    return x.to(wide_dtype(x))
