"""Losses that are a mean over positive pairs plus a mean over negative pairs: MIO, SigLIP.

# V views of B samples on this rank, N samples over all ranks, D width; u_i = z_i / |z_i|; s_ik = u_i . u_k
# t, t_p inverse temperatures of negatives and positives, b bias; l = t s + b;  Neg(i): see pair_loss/terms.py

| `positives` | term, averaged over the ordered positive pairs |
|-------------|------------------------------------------------|
| `linear`    | -t_p s                                         |
| `softplus`  | log(1 + e^{-(t_p s + b)})                      |

| `negatives` | term over i and Neg(i)                     |
|-------------|--------------------------------------------|
| `exp`       | mean e^l                                   |
| `jensen`    | log(1 + mean e^l), the mean over all ranks |
| `softplus`  | mean log(1 + e^l)                          |
| `square`    | mean l^2                                   |
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.exchange import ALONE, Exchange
from kernels.pair_loss.terms import PairTerms, Topology, pair_terms
from kernels.similarity import Impl, Kind
from kernels.similarity.exponent import check_bias, check_inv_temperature, exp_shift, is_narrow, log_of_sum, scalar

__all__ = ["Negatives", "PairTerms", "Positives", "Topology", "count_negatives", "pair_loss", "pair_terms", "softplus"]

Positives = Literal["linear", "softplus"]
Negatives = Literal["exp", "jensen", "softplus", "square"]

_KIND: dict[Negatives, Kind] = {"exp": "exp", "jensen": "exp", "softplus": "softplus", "square": "square"}


def pair_loss(
    z: Tensor,
    *,
    negatives: Negatives,
    positives: Positives = "linear",
    inv_temperature: float | Tensor,
    positive_inv_temperature: float | Tensor | None = None,
    bias: float | Tensor = 0.0,
    balanced: bool = True,
    topology: Topology = "self",
    groups: Tensor | None = None,
    exchange: Exchange = ALONE,
    impl: Impl = "auto",
) -> Tensor:
    """Compute the mean positive term plus the mean negative term, in one pass over the pairs.

    MIO, arXiv:2111.12664 (see `fastssl.losses.mio` for the forms used in the paper); SigLIP, Zhai et al. 2023,
    arXiv:2303.15343, Eq. 1: `softplus` twice, `cross`, not balanced, a learned inv_temperature and bias.

    Args:
        z: Projections [V, B, D], V >= 2, any floating dtype; normalised inside. Differentiable.
        negatives: A row of the second table.
        positives: A row of the first.
        inv_temperature: t, > 0, dimensionless; a number or a 0-dim tensor, which may be learned.
        positive_inv_temperature: t_p; None: t.
        bias: b, a number or a 0-dim tensor, which may be learned.
        balanced: Average positives and negatives separately. False: the negatives of a row are summed, as in SigLIP.
        topology: "self": all rows against all rows. "cross": V = 2, rows of view 0 against those of view 1.
        groups: Integers [B]: samples with equal groups, on any rank, are not negatives of each other.
        exchange: The other ranks; their z has the same shape.
        impl: See `kernels.similarity`.

    Returns:
        0-dim, fp32 (fp64 for fp64 z), in nats (`square`: no unit). Its mean over ranks is the loss of the global batch.
        Averaging the parameter gradients over ranks gives the gradient of that loss.

    Raises:
        ValueError: Shapes, dtypes, devices or choices do not fit, there is one sample over all ranks, or a temperature
            or bias given as a number leaves fp32's range.
    """
    if negatives not in _KIND:
        raise ValueError(f"negatives must be one of {', '.join(_KIND)}, got {negatives!r}")
    if positives not in get_args(Positives):
        raise ValueError(f"positives must be one of {', '.join(get_args(Positives))}, got {positives!r}")
    kind = _KIND[negatives]
    if positive_inv_temperature is None:
        positive_inv_temperature = inv_temperature
    check_inv_temperature(inv_temperature, of_exp=kind == "exp")
    check_inv_temperature(positive_inv_temperature, of_exp=False, name="positive_inv_temperature")
    check_bias(bias)
    t, b = scalar(inv_temperature, z), scalar(bias, z, name="bias")
    t_p = positive_inv_temperature
    if isinstance(t_p, Tensor):
        t_p = scalar(t_p, z, name="positive_inv_temperature")
    wide_range = not (is_narrow(inv_temperature) and not isinstance(bias, Tensor) and bias == 0)
    # Minus the bias: the terms are e^{t s + 40 - t} for any b, and d/db still equals that of e^l.
    shift = exp_shift(t) - b.detach() if kind == "exp" and wide_range else None
    terms = pair_terms(
        z,
        kind=kind,
        inv_temperature=t,
        bias=b if shift is None else b + shift,
        wide_range=wide_range,
        topology=topology,
        groups=groups,
        exchange=exchange,
        impl=impl,
    )
    num_negatives = count_negatives(z, topology, groups, exchange)
    negative_term = _negative_term(terms.total / num_negatives, shift, negatives, exchange)
    if not balanced:
        negative_term = negative_term * (num_negatives / _num_rows(z, topology))
    return _positive_term(terms.positives, positives, t_p, b) + negative_term


def _positive_term(similarities: Tensor, positives: Positives, t_p: float | Tensor, b: Tensor) -> Tensor:
    if positives == "linear":
        return similarities.mean() * -t_p
    return softplus(-(t_p * similarities + b)).mean()


def _negative_term(mean: Tensor, shift: Tensor | None, negatives: Negatives, exchange: Exchange) -> Tensor:
    """Compute the negative term from the mean of f; for `exp` and `jensen` the mean is multiplied by e^shift."""
    if negatives == "exp":
        return mean if shift is None else torch.exp(-shift) * mean
    if negatives == "jensen":
        log_mean = log_of_sum(exchange.mean(mean))
        return softplus(log_mean if shift is None else log_mean - shift)
    return mean


def count_negatives(z: Tensor, topology: Topology, groups: Tensor | None, exchange: Exchange) -> float | Tensor:
    """The sum of |Neg(i)| over the rows i counted by `pair_terms`; with groups, its mean over ranks."""
    (num_views, num_local, _), num_samples = z.shape, z.shape[1] * exchange.size
    per_pair_of_samples = num_views**2 if topology == "self" else 1
    if groups is None:
        return per_pair_of_samples * num_local * (num_samples - 1)
    every = torch.sort(torch.cat([piece.flatten() for piece in exchange.blocks(groups[None])])).values
    own = groups.contiguous()  # searchsorted warns if its input is not contiguous
    num_equal = torch.searchsorted(every, own, right=True) - torch.searchsorted(every, own)
    counts = (num_samples - num_equal).sum() * per_pair_of_samples
    return exchange.mean(counts.to(scalar(1.0, z))).clamp_min(1)


def _num_rows(z: Tensor, topology: Topology) -> int:
    return z.shape[1] * (len(z) if topology == "self" else 1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact: F.softplus becomes linear above 20."""
    return -F.logsigmoid(-x)
