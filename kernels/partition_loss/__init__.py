"""Losses with a log-sum-exp over each row's negatives: NT-Xent, DCL, CLIP.

# V views of B samples on this rank, N samples over all ranks, D width; u_i = z_i / |z_i|; s_ik = u_i . u_k
# t inverse temperature;  s_p similarity of row i and a positive;  Neg(i): see pair_loss/terms.py
# lse_i = log sum_{k in Neg(i)} e^{t s_ik}

| `form`    | term, averaged over the ordered positive pairs          | source                                       |
|-----------|---------------------------------------------------------|----------------------------------------------|
| `nt_xent` | log(1 + e^{lse_i - t s_p}) = -t s_p + log sum_{k != i}  | Chen et al. 2020, arXiv:2002.05709, Eq. 1    |
| `dcl`     | -t s_p + lse_i                                          | Yeh et al. 2021, arXiv:2110.06848, Eq. 5     |
| `dclw`    | -w_i t s_p + lse_i, w_i = 2 - N softmax_i(s_p / .5)     | the same, Eq. 7                              |

With `cross` topology `nt_xent` is CLIP's loss (Radford et al. 2021, arXiv:2103.00020): the mean of both directions.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.exchange import ALONE, Exchange
from kernels.pair_loss import softplus
from kernels.pair_loss.terms import Topology
from kernels.partition_loss.terms import PartitionTerms, partition_terms
from kernels.similarity import Impl
from kernels.similarity.exponent import check_inv_temperature, scalar
from kernels.similarity.rows import view_pairs

__all__ = ["Form", "PartitionTerms", "partition_loss", "partition_terms"]

Form = Literal["nt_xent", "dcl", "dclw"]
DCLW_TEMPERATURE = 0.5  # sigma of Eq. 7


def partition_loss(
    z: Tensor,
    *,
    form: Form = "nt_xent",
    inv_temperature: float | Tensor,
    topology: Topology = "self",
    groups: Tensor | None = None,
    exchange: Exchange = ALONE,
    impl: Impl = "auto",
) -> Tensor:
    """Compute the mean of the form's term over the positive pairs, in two passes; no pairwise matrix is stored.

    Args:
        z: Projections [V, B, D], V >= 2 (`dclw`: V = 2), any floating dtype; normalised inside. Differentiable.
        form: A row of the table.
        inv_temperature: t, > 0, dimensionless; a number or a 0-dim tensor, which may be learned.
        topology: "self": all rows against all rows. "cross": V = 2, the rows of each view against those of the other.
        groups: Integers [B]: samples with equal groups, on any rank, are not negatives of each other. A row without
            any negative adds 0 to `nt_xent`, and only -w_i t s_p to `dcl` and `dclw`.
        exchange: The other ranks; their z has the same shape.
        impl: See `kernels.similarity`.

    Returns:
        0-dim, fp32 (fp64 for fp64 z), in nats. Its mean over ranks is the loss of the global batch.

    Raises:
        ValueError: Shapes, dtypes, devices or choices do not fit, there is one sample over all ranks, or a temperature
            given as a number leaves fp32's range.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    if form == "dclw" and len(z) != 2:
        raise ValueError(f"form dclw is for two views, got {len(z)}")
    check_inv_temperature(inv_temperature, of_exp=True)
    t = scalar(inv_temperature, z)
    terms = partition_terms(z, inv_temperature=t, topology=topology, groups=groups, exchange=exchange, impl=impl)
    logits = t * terms.positives
    # One term for each row and each of its positives: [ordered pairs, B].
    log_sums = _of_pairs(terms.log_sums)
    logits = torch.cat([logits, logits])
    if form == "nt_xent":
        return softplus(log_sums - logits).mean()
    log_sums = log_sums.masked_fill(_of_pairs(terms.is_empty), 0.0)  # drops the placeholder of empty sums
    if form == "dclw":
        logits = logits * _dclw_weights(terms.positives, exchange).repeat(2, 1)
    return (log_sums - logits).mean()


def _of_pairs(x: Tensor) -> Tensor:
    """[V, B] -> [V (V - 1), B]: the first row of each pair of views, then the second of each.

    Indexes one view at a time: indexing with a list would copy the list to the device and synchronise.
    """
    first, second = zip(*view_pairs(len(x)), strict=True)
    return torch.stack([x[v] for v in first + second])


def _dclw_weights(positives: Tensor, exchange: Exchange) -> Tensor:
    """w_i = 2 - N softmax_i(s_p / sigma), over the samples of all ranks; mean 1, no gradient: [1, B]."""
    exponentials = torch.exp((positives.detach() - 1) / DCLW_TEMPERATURE)  # in [e^-4, 1]: no maximum to subtract
    return 2 - exponentials / exchange.mean(exponentials.mean())
