"""Barlow Twins: Zbontar et al. 2021, arXiv:2103.03230, Eq. 1 and 2.

# N global batch, D projection; a, b two views; x = (z - mean)/sqrt(variance + 1e-5) for each view and column, over N

    C = (1/N) sum_i x_a,i x_b,i^T  [D, D]
    L = sum_d (1 - C_dd)^2 + lambda sum_{d != e} C_de^2

With more than two views: the mean over all pairs of views.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.moments import center, covariances, variances
from fastssl.losses.pairwise import stack_views
from kernels.similarity.rows import view_pairs
from pipelines.config_field import setting

EPSILON = 1e-5  # eps of the parameter-free batch norm in the authors' code


@dataclass(frozen=True, kw_only=True)
class BarlowTwinsConfig(LossConfig):
    """Settings of `BarlowTwins`.

    Attributes:
        name: Selects this loss.
        redundancy_weight: lambda, .0051 in the authors' code.
    """

    has_moments: ClassVar[bool] = True
    name: Literal["barlow_twins"] = "barlow_twins"
    redundancy_weight: float = setting(0.0051, "[0, 1e6]")


class BarlowTwins(Loss[BarlowTwinsConfig]):
    """Pushes the cross-correlation matrix of two views over the batch towards the identity."""

    configs = (BarlowTwinsConfig,)

    def forward(self, *z: Tensor) -> Tensor:
        """The loss, from statistics of the global batch, the same on every rank; see `Loss`."""
        rows = stack_views(*z)
        with torch.autocast(rows.device.type, enabled=False):
            x = center(rows)
            deviation = (variances(x) + EPSILON).sqrt()  # [V, D]
            first, second = zip(*view_pairs(len(x)), strict=True)
            correlation = covariances(_views(x, first), _views(x, second))  # [pairs, D, D]
            correlation = correlation / (_views(deviation, first)[:, :, None] * _views(deviation, second)[:, None, :])
            diagonal = correlation.diagonal(dim1=1, dim2=2)
            on = (1 - diagonal).square().sum(1)
            off = correlation.square().sum((1, 2)) - diagonal.square().sum(1)
            return (on + self.config.redundancy_weight * off).mean()


def _views(x: Tensor, views: tuple[int, ...]) -> Tensor:
    """Select views of x [V, ...]; indexing with a list would copy the index from the host."""
    return torch.stack([x[view] for view in views])
