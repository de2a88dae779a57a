"""BYOL: Grill et al. 2020, arXiv:2006.07733, Eq. 2; and with a linear predictor (LinearBYOL).

# z of the online network, z' of the target; q the predictor; sg(x): x without gradient; a, b two views

    L = [2 - 2 cos(q(z_a), sg(z'_b))] + [2 - 2 cos(q(z_b), sg(z'_a))]

With more than two views: the mean over all pairs of views, each in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import stack_views
from fastssl.losses.predictor import build_predictor
from fastssl.losses.view_pairs import mean_cosine
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class ByolConfig(LossConfig):
    """Settings of `Byol`.

    Attributes:
        name: Selects this loss.
        predictor_hidden: Width of the predictor's hidden layer, 4096 in the paper.
        target_momentum: Initial tau, increased to 1 on a cosine; .996 in the paper, .99 for its 300 epochs.
    """

    takes_width: ClassVar[bool] = True
    name: Literal["byol"] = "byol"
    predictor_hidden: int = setting(4096, "[1, 65536]")
    target_momentum: float = setting(0.996, "[0, 1]")


@dataclass(frozen=True, kw_only=True)
class LinearByolConfig(LossConfig):
    """Settings of `Byol` with one linear layer as its predictor.

    Attributes:
        name: Selects this loss.
        target_momentum: As in `ByolConfig`.
    """

    takes_width: ClassVar[bool] = True
    name: Literal["linear_byol"] = "linear_byol"
    target_momentum: float = setting(0.996, "[0, 1]")


class Byol(Loss[ByolConfig | LinearByolConfig]):
    """The online network predicts the target network's projection of another view."""

    configs = (ByolConfig, LinearByolConfig)

    def __init__(
        self, config: ByolConfig | LinearByolConfig | None = None, *, projector_dim: int, **settings: Any
    ) -> None:
        super().__init__(config, **settings)
        config = self.config
        self.predictor: nn.Module = (
            build_predictor(projector_dim, config.predictor_hidden)
            if isinstance(config, ByolConfig)
            else nn.Linear(projector_dim, projector_dim)
        )

    def forward(self, *z: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The loss of this rank's rows, in [0, 8]; see `Loss`."""
        rows = stack_views(*z)
        predictions = self.predictor(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return 2 * (2 - 2 * mean_cosine(predictions, torch.stack(list(targets))))
