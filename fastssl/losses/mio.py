"""MIO: mutual information optimisation by binary contrastive learning, arXiv:2111.12664.

# B local batch, N global batch, D projection; s_ik, p(i), Neg(i) as in losses/pairwise.py
# tau_p, tau_n the temperatures; x_ik = s_ik/tau_n; sp(x) = log(1 + e^x); mean_N the mean over i and Neg(i)

`naive` is [paper]: version 1 and its authors' code. The other four are [derived]: the abstracts of versions 2 and 3
name two edits (drop the repulsion between positives, bound the negative term from above) but not the formula.

| negative    | positive term        | negative term                  | what it bounds (tau_p = tau_n)            |
|-------------|----------------------|--------------------------------|-------------------------------------------|
| `naive`     | mean sp(-s_p/tau_p)  | mean_N sp(x)                   | Jensen-Shannon: (2 log 2 - L)/2 <= JSD    |
| `exp`       | -mean s_p/tau_p      | mean_N e^x                     | Nguyen-Wainwright-Jordan: 1 - L <= KL     |
| `jensen`    | -mean s_p/tau_p      | log(1 + mean_N e^x)            | -L <= Donsker-Varadhan <= KL              |
| `quadratic` | -mean s_p/tau_p      | mean_N (log 2 + x/2 + x^2/8)   | chi^2, not in nats                        |
| `softplus`  | -mean s_p/tau_p      | mean_N sp(x)                   | nothing: for ablation only                |

`jensen` with per_anchor takes one logarithm per row: mean_i log(1 + mean_{k in Neg(i)} e^x_ik).
JSD and KL are those of the joint distribution of two views against the product of its marginals; KL is their mutual
information.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastssl.collectives import EXCHANGE
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import EXP_TEMPERATURE, LOWEST_EXP_TEMPERATURE, TEMPERATURE, stack_views
from fastssl.losses.view_pairs import unit_rows
from kernels.gram_loss import quadratic_loss
from kernels.pair_loss import count_negatives, pair_loss, softplus
from kernels.partition_loss import partition_terms
from kernels.similarity import Impl
from kernels.similarity.exponent import scalar
from kernels.similarity.rows import view_pairs
from pipelines.config_field import setting

Negative = Literal["naive", "exp", "jensen", "quadratic", "softplus"]


@dataclass(frozen=True, kw_only=True)
class MioConfig(LossConfig):
    """Settings of `Mio`.

    Attributes:
        name: Selects this loss.
        negative: The variant, a row of the table above; `exp` was best on held-out images
            (benchmarks/results/study.csv).
        per_anchor: `jensen` only: one logarithm per row instead of one for the batch [derived].
        temperature_positive: tau_p, .5 [paper].
        temperature_negative: tau_n, .5 [paper]; at least .0167 for `exp` and `jensen`.
        alignment_weight: lambda in lambda * mean((u_a - u_b)^2) over pairs of views; the paper uses 0 or 1 [paper].
        impl: Implementation of the sum over pairs, see `kernels.similarity`.
    """

    name: Literal["mio"] = "mio"
    negative: Negative = "exp"
    per_anchor: bool = False
    temperature_positive: float = setting(0.5, TEMPERATURE)
    temperature_negative: float = setting(0.5, TEMPERATURE)
    alignment_weight: float = setting(0.0, "[0, 1e6]")
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_anchor and self.negative != "jensen":
            raise ValueError(f"loss.per_anchor needs loss.negative=jensen, got {self.negative}")
        if self.negative in ("exp", "jensen") and self.temperature_negative < LOWEST_EXP_TEMPERATURE:
            raise ValueError(
                f"temperature_negative must be in {EXP_TEMPERATURE} for loss.negative {self.negative}, "
                f"not {self.temperature_negative}: exp(similarity / temperature) would exceed the range of fp32"
            )


class Mio(Loss[MioConfig]):
    """Positive term + negative term + alignment_weight * mean((u_a - u_b)^2)."""

    configs = (MioConfig,)

    def forward(self, *z: Tensor) -> Tensor:
        """The loss of this rank's rows, normalised, against the negatives of all ranks, in nats; see `Loss`."""
        rows = stack_views(*z)
        loss = self._pairs(rows)
        if self.config.alignment_weight:
            u = unit_rows(rows)
            distances = [(u[v] - u[w]).square().mean() for v, w in view_pairs(len(u))]
            loss = loss + self.config.alignment_weight * torch.stack(distances).mean()
        return loss

    def _pairs(self, z: Tensor) -> Tensor:
        """Positive term + negative term."""
        config = self.config
        settings = {"exchange": EXCHANGE, "impl": config.impl}
        t_p, t_n = 1 / config.temperature_positive, 1 / config.temperature_negative
        if config.negative == "quadratic":
            return quadratic_loss(z, inv_temperature=t_n, positive_inv_temperature=t_p, **settings)
        if config.per_anchor:
            terms = partition_terms(z, inv_temperature=scalar(t_n, z), **settings)
            num_negatives = count_negatives(z, "self", None, EXCHANGE) / terms.log_sums.numel()
            return softplus(terms.log_sums - math.log(num_negatives)).mean() - t_p * terms.positives.mean()
        # sp(-x) = sp(x) - x: the linear forms drop sp(x), which pushes positives apart.
        return pair_loss(
            z,
            positives="softplus" if config.negative == "naive" else "linear",
            negatives="softplus" if config.negative == "naive" else config.negative,
            inv_temperature=t_n,
            positive_inv_temperature=t_p,
            **settings,
        )

    def bound_nats(self, value: float) -> float | None:
        """Lower bound in nats on the dependence of two views implied by a loss value, or None if there is none.

        `naive` bounds the Jensen-Shannon divergence, which is at most log 2. `exp` and `jensen` bound the mutual
        information. The bounds hold for the expectation over batches (`jensen` takes the log of a batch mean, so its
        bound holds up to the bias of that). An alignment weight makes the bound weaker, but not wrong.
        """
        config = self.config
        if config.temperature_positive != config.temperature_negative:  # two critics: no variational bound
            return None
        bounds = {"naive": math.log(2) - value / 2, "exp": 1 - value, "jensen": -value}
        return bounds.get(config.negative)
