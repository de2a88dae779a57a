"""The pairwise sigmoid loss of SigLIP, between two views: Zhai et al. 2023, arXiv:2303.15343, Eq. 1.

# B local batch, N global batch, D projection; s_ij = u_a,i . u_b,j; y_ij = 1 for i = j, else -1; t, b learned

    L = -(1/N) sum_ij log sigma(y_ij (t s_ij + b))
      = mean_i softplus(-(t s_ii + b)) + (1/N) sum_{i != j} softplus(t s_ij + b)
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastssl.collectives import EXCHANGE
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import stack_views
from kernels.pair_loss import pair_loss
from kernels.similarity import Impl
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class SigLipConfig(LossConfig):
    """Settings of `SigLip`.

    Attributes:
        name: Selects this loss.
        initial_inv_temperature: Initial t, 10 in the paper; t = e^{t'}, and t' is learned.
        initial_bias: Initial b, -10 in the paper, because most pairs are negative.
        impl: Implementation of the sum over pairs, see `kernels.similarity`.
    """

    max_views: ClassVar[int] = 2
    name: Literal["siglip"] = "siglip"
    initial_inv_temperature: float = setting(10.0, "[1e-4, 1e4]")
    initial_bias: float = setting(-10.0, "[-1e4, 1e4]")
    impl: Impl = "auto"


class SigLip(Loss[SigLipConfig]):
    """Classifies each pair of a row of view a and a row of view b as the same sample or not."""

    configs = (SigLipConfig,)

    def __init__(self, config: SigLipConfig | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        config = self.config
        # Shape [1], because DeepSpeed cannot broadcast 0-dim parameters to the other ranks.
        self.log_inv_temperature = nn.Parameter(torch.tensor([math.log(config.initial_inv_temperature)]))
        self.bias = nn.Parameter(torch.tensor([float(config.initial_bias)]))

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of this rank's rows of view a against all ranks' of view b, normalised, in nats; see `Loss`."""
        return pair_loss(
            stack_views(z_a, z_b),
            positives="softplus",
            negatives="softplus",
            inv_temperature=self.log_inv_temperature.exp(),
            bias=self.bias,
            balanced=False,
            topology="cross",
            exchange=EXCHANGE,
            impl=self.config.impl,
        )
