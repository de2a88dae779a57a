"""VICReg: Bardes et al. 2022, arXiv:2105.04906, Eq. 6, as in the authors' code.

# N global batch, D projection; a, b two views; Cov the covariance over the batch, / (N - 1); S = sqrt(Cov_dd + 1e-4)

    s(a, b) = mean over i and d of (z_a - z_b)^2        invariance
    v(z)    = mean_d max(0, 1 - S_d)                    variance
    c(z)    = (1/D) sum_{d != e} Cov_de^2               covariance
    L = lambda s(a, b) + mu [v(a) + v(b)]/2 + nu [c(a) + c(b)]

With more than two views: the mean over all pairs of views.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastssl import collectives
from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.moments import center, covariances
from fastssl.losses.pairwise import stack_views
from kernels.similarity.rows import view_pairs, widen
from pipelines.config_field import setting

EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class VicRegConfig(LossConfig):
    """Settings of `VicReg`; the weights are the paper's.

    Attributes:
        name: Selects this loss.
        invariance_weight: lambda.
        variance_weight: mu.
        covariance_weight: nu.
    """

    has_moments: ClassVar[bool] = True
    name: Literal["vicreg"] = "vicreg"
    invariance_weight: float = setting(25.0, "[0, 1e6]")
    variance_weight: float = setting(25.0, "[0, 1e6]")
    covariance_weight: float = setting(1.0, "[0, 1e6]")


class VicReg(Loss[VicRegConfig]):
    """Makes views agree, keeps every column's variance over the batch up, and decorrelates columns."""

    configs = (VicRegConfig,)

    def forward(self, *z: Tensor) -> Tensor:
        """The loss, from statistics of the global batch; see `Loss`."""
        rows, config = stack_views(*z), self.config
        num_samples = rows.shape[1] * collectives.world_size()
        with torch.autocast(rows.device.type, enabled=False):
            wide = widen(rows)
            invariance = torch.stack([(wide[v] - wide[w]).square().mean() for v, w in view_pairs(len(wide))]).mean()
            x = center(wide)
            covariance = covariances(x, x) * (num_samples / (num_samples - 1))  # [V, D, D]
            variance = covariance.diagonal(dim1=1, dim2=2)
            hinge = (1 - (variance + EPSILON).sqrt()).relu().mean()
            off_diagonal = (covariance.square().sum((1, 2)) - variance.square().sum(1)) / rows.shape[2]
        return (
            config.invariance_weight * invariance
            + config.variance_weight * hinge
            + config.covariance_weight * 2 * off_diagonal.mean()
        )
