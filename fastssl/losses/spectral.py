"""The spectral contrastive loss: HaoChen et al. 2021, arXiv:2106.04156, Eq. 6, as in the authors' code.

# N global batch, D projection; x = z, rescaled to the norm sqrt(mu) if it is longer; a, b the views

    L = (1/mu) [ -(2/N) sum_i x_a,i . x_b,i + 1/(N (N - 1)) sum_{i != j} (x_a,i . x_b,j)^2 ]

Computed from D x D moments without enumerating pairs: O(N D^2).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastssl.collectives import EXCHANGE
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import stack_views
from kernels.gram_loss import spectral_loss
from kernels.similarity import Impl
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(LossConfig):
    """Settings of `Spectral`.

    Attributes:
        name: Selects this loss.
        mu: Maximum squared norm; longer rows are rescaled to it, > 0; the authors use 1 for CIFAR and 10 for
            ImageNet.
        impl: Implementation of the sums, see `kernels.gram_loss.terms.gram_terms`.
    """

    has_moments: ClassVar[bool] = True
    needs_mean: ClassVar[bool] = True
    max_views: ClassVar[int] = 2
    name: Literal["spectral"] = "spectral"
    mu: float = setting(1.0, "[1e-6, 1e6]")
    impl: Impl = "auto"


class Spectral(Loss[SpectralConfig]):
    """Factorises the similarity of images under augmentation, up to a rotation."""

    configs = (SpectralConfig,)

    def forward(self, *z: Tensor) -> Tensor:
        """The loss of this rank's rows of view a against all ranks' rows of view b; see `Loss`."""
        rows = stack_views(*z)
        return spectral_loss(rows, mu=self.config.mu, exchange=EXCHANGE, impl=self.config.impl)
