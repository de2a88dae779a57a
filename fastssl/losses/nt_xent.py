"""NT-Xent, the loss of SimCLR: Chen et al. 2020, arXiv:2002.05709, Eq. 1.

# B local batch, N global batch, D projection; s_ik, p(i), Neg(i) as in losses/pairwise.py; s_p = s_{i,p(i)}

    L = mean_i [ -s_p/tau + log sum_{k != i} e^{s_ik/tau} ]
      = mean_i log(1 + e^{-s_p/tau} sum_{k in Neg(i)} e^{s_ik/tau})
      = mean_i softplus(log r_i + (1 - s_p)/tau),   r_i = sum_{k in Neg(i)} e^{(s_ik - 1)/tau}
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.losses.pairwise import (
    check_impl,
    check_temperature,
    positive_similarities,
    softplus,
    symmetric_pair_sums,
    unit_rows,
)
from kernels.pair_loss import Impl


@dataclass(frozen=True, kw_only=True)
class NtXentConfig:
    """Settings of `NtXent`.

    Attributes:
        name: Selects this loss.
        temperature: tau, at least .025; .5 is the paper's best on CIFAR-10 (appendix B.9).
        impl: How the pairs are summed, see `kernels.pair_loss.pair_sums`.
    """

    name: Literal["simclr"] = "simclr"
    temperature: float = 0.5
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_temperature("loss.temperature", self.temperature, of_exp=True)
        check_impl(self.impl)


class NtXent(nn.Module):
    """Cross-entropy of finding each row's partner among all other rows of the global batch."""

    def __init__(self, config: NtXentConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The mean loss of this rank's 2B rows against every rank's.

        Args:
            z_a: Projections of view a [B, D], any floating dtype; normalised inside.
            z_b: Same for view b; row i is the positive of z_a[i].

        Returns:
            Scalar, fp32 (fp64 for fp64 inputs), nats; its mean over ranks is the loss of the global batch.

        Raises:
            ValueError: Shapes or dtypes differ, or the global batch has fewer than two samples.
        """
        u = unit_rows(z_a, z_b)
        inv_temperature = 1 / self.config.temperature
        sums = symmetric_pair_sums(u, kind="exp", inv_temperature=inv_temperature, impl=self.config.impl)
        gaps = (1 - positive_similarities(u)) * inv_temperature
        return softplus(torch.log(sums) + gaps.repeat(2)).mean()

    def bound_nats(self, value: float) -> float | None:
        """None: the InfoNCE bound log(2N - 1) - value depends on the batch and saturates at its logarithm."""
        return None
