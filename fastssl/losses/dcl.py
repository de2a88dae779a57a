"""Decoupled contrastive learning: Yeh et al. 2021, arXiv:2110.06848.

# B local batch, N global batch, D projection; s_ik, Neg(i) as in losses/pairwise.py; s_p = s_{i,p(i)}

    DCL   (Eq. 5)   L = mean_i [ -s_p/tau + log sum_{k in Neg(i)} e^{s_ik/tau} ]
    DCLW  (Eq. 7)   the same with w_i s_p for s_p,   w_i = 2 - N softmax_i(s_p/sigma), sigma = .5, no gradient

NT-Xent without the positive in the sum: with it, the gradient vanishes once a positive is easy.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastssl.collectives import EXCHANGE
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import EXP_TEMPERATURE, stack_views
from kernels.partition_loss import partition_loss
from kernels.similarity import Impl
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class DclConfig(LossConfig):
    """Settings of `Dcl`.

    Attributes:
        name: Selects this loss.
        temperature: tau, at least .0167; .1 in the paper.
        impl: Implementation of the sum over pairs, see `kernels.similarity`.
    """

    name: Literal["dcl"] = "dcl"
    temperature: float = setting(0.1, EXP_TEMPERATURE)
    impl: Impl = "auto"


@dataclass(frozen=True, kw_only=True)
class DclwConfig(DclConfig):
    """Settings of `Dcl` with weighted positives (DCLW); same fields as `DclConfig`."""

    max_views: ClassVar[int] = 2
    name: Literal["dclw"] = "dclw"  # pyright: ignore[reportIncompatibleVariableOverride]


class Dcl(Loss[DclConfig]):
    """Attraction to the positive and repulsion from all other samples, decoupled from each other."""

    configs = (DclConfig, DclwConfig)

    def forward(self, *z: Tensor) -> Tensor:
        """The mean loss of this rank's 2B rows, normalised, against the rows of all ranks, in nats; see `Loss`."""
        rows = stack_views(*z)
        t, impl = 1 / self.config.temperature, self.config.impl
        return partition_loss(rows, form=self.config.name, inv_temperature=t, exchange=EXCHANGE, impl=impl)
