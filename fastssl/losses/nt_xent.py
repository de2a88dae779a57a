"""NT-Xent, the loss of SimCLR: Chen et al. 2020, arXiv:2002.05709, Eq. 1.

# B local batch, N global batch, D projection; s_ik, p(i), Neg(i) as in losses/pairwise.py; s_p = s_{i,p(i)}

    L = mean_i [ -s_p/tau + log sum_{k != i} e^{s_ik/tau} ]
      = mean_i log(1 + e^{-s_p/tau} sum_{k in Neg(i)} e^{s_ik/tau})
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastssl.collectives import EXCHANGE
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import EXP_TEMPERATURE, stack_views
from kernels.partition_loss import partition_loss
from kernels.similarity import Impl
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class NtXentConfig(LossConfig):
    """Settings of `NtXent`.

    Attributes:
        name: Selects this loss.
        temperature: tau, at least .0167; .5 is the paper's best on CIFAR-10 (appendix B.9).
        impl: Implementation of the sum over pairs, see `kernels.similarity`.
    """

    name: Literal["simclr"] = "simclr"
    temperature: float = setting(0.5, EXP_TEMPERATURE)
    impl: Impl = "auto"


class NtXent(Loss[NtXentConfig]):
    """Cross-entropy of identifying each row's positive among all other rows of the global batch."""

    configs = (NtXentConfig,)

    def forward(self, *z: Tensor) -> Tensor:
        """The mean loss of this rank's 2B rows, normalised, against the rows of all ranks, in nats; see `Loss`."""
        rows = stack_views(*z)
        t, impl = 1 / self.config.temperature, self.config.impl
        return partition_loss(rows, form="nt_xent", inv_temperature=t, exchange=EXCHANGE, impl=impl)
