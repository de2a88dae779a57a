"""Losses that are quadratic in the similarities, computed in O(N D^2): spectral, and MIO's quadratic form.

# V views of B samples on this rank, N samples over all ranks, D width; s_p of a positive pair, s_ik of a negative pair

| `form`      | loss                                                                    | source               |
|-------------|-------------------------------------------------------------------------|----------------------|
| `spectral`  | (1/mu) (-2 mean s_p + mean s_ik^2), rows clipped to the norm sqrt(mu)   | arXiv:2106.04156     |
| `quadratic` | -t_p mean s_p + mean(log 2 + l/2 + l^2/8), l = t s_ik, unit rows        | [derived] from MIO   |
"""

import math

import torch
from torch import Tensor

from kernels.exchange import ALONE, Exchange
from kernels.gram_loss.terms import gram_terms
from kernels.pair_loss import count_negatives
from kernels.pair_loss.terms import Topology, check_views
from kernels.similarity import Impl, choose_impl
from kernels.similarity.exponent import check_inv_temperature
from kernels.similarity.rows import widen

__all__ = ["gram_terms", "quadratic_loss", "spectral_loss"]


def spectral_loss(
    z: Tensor, *, mu: float = 1.0, topology: Topology = "cross", exchange: Exchange = ALONE, impl: Impl = "auto"
) -> Tensor:
    """The spectral contrastive loss of HaoChen et al. 2021, arXiv:2106.04156, Eq. 6, as in the authors' code.

    Args:
        z: Projections [V, B, D], V >= 2, any floating dtype; longer rows are shortened to sqrt(mu). Differentiable.
        mu: > 0; the authors use 1 for CIFAR and 10 for ImageNet.
        topology: "cross", as in the paper: V = 2, i of view 0, k != i of view 1. "self" uses all rows.
        exchange: The other ranks; their z has the same shape.
        impl: See `kernels.gram_loss.terms.gram_terms`.

    Returns:
        0-dim, fp32 (fp64 for fp64 z). Its mean over ranks is the loss of the global batch.

    Raises:
        ValueError: Shapes, dtypes or choices do not fit, or mu is not > 0.
    """
    if not (math.isfinite(mu) and mu > 0):
        raise ValueError(f"mu must be finite and > 0, got {mu}")
    check_views(z, topology, None, exchange.size)
    impl = choose_impl(impl, z)  # chosen by the dtype of the input: the rows below are fp32
    wide = widen(z)
    longest = math.sqrt(mu)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    clipped = wide * (longest / norm.clamp_min(longest))
    terms = gram_terms(clipped, linear=0.0, square=1.0, unit=False, topology=topology, exchange=exchange, impl=impl)
    num_negatives = count_negatives(z, topology, None, exchange)
    return (terms.total / num_negatives - 2 * terms.positives.mean()) / mu


def quadratic_loss(
    z: Tensor,
    *,
    inv_temperature: float,
    positive_inv_temperature: float | None = None,
    topology: Topology = "self",
    exchange: Exchange = ALONE,
    impl: Impl = "auto",
) -> Tensor:
    """MIO's form with the quadratic upper bound of the softplus, log 2 + l/2 + l^2/8 [derived].

    Args:
        z: Projections [V, B, D], V >= 2, any floating dtype; normalised inside. Differentiable.
        inv_temperature: t, > 0, dimensionless. It must be a number, like all parameters here; it cannot be learned.
        positive_inv_temperature: t_p; None: t.
        topology: See `kernels.pair_loss.pair_loss`.
        exchange: The other ranks; their z has the same shape.
        impl: See `kernels.gram_loss.terms.gram_terms`.

    Returns:
        0-dim, fp32 (fp64 for fp64 z). Its mean over ranks is the loss of the global batch.

    Raises:
        ValueError: Shapes, dtypes or choices do not fit, or the temperature is not a positive number.
    """
    t = inv_temperature
    t_p = t if positive_inv_temperature is None else positive_inv_temperature
    for name, number in (("inv_temperature", t), ("positive_inv_temperature", t_p)):
        if isinstance(number, Tensor):
            raise ValueError(f"{name} must be a number: the moments' factors are not learned; got a tensor")
        check_inv_temperature(number, of_exp=False, name=name)
    terms = gram_terms(z, linear=t / 2, square=t * t / 8, topology=topology, exchange=exchange, impl=impl)
    num_negatives = count_negatives(z, topology, None, exchange)
    return math.log(2) + terms.total / num_negatives - t_p * terms.positives.mean()
