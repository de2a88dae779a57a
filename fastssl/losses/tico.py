"""TiCo: Zhu et al. 2022, arXiv:2206.10698.

# V views of N samples over all ranks; D projection; u = z/|z| of the online network, t of the target; a, b two views
# B = mean of u u^T over all rows, both views; sg(x): x without gradient

    C <- beta C + (1 - beta) B,  from 0
    L = 1 - mean [u_a . t_b + u_b . t_a]/2 + rho mean u^T sg(C) u

C is updated with the batch before it is used. With more than two views, the first mean is over all pairs of views.
MINC's loss divided by its scale s is this loss with rho = s/2, up to the constant and to what C and Lambda average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.moments import MovingMoment, second_moment
from fastssl.losses.pairwise import stack_views
from fastssl.losses.view_pairs import mean_cosine, unit_rows
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class TiCoConfig(LossConfig):
    """Settings of `TiCo`.

    Attributes:
        name: Selects this loss.
        covariance_weight: rho, 8 [second-hand: Lightly's default].
        moment_momentum: beta of C's average, in [0, 1); .9 [second-hand].
        target_momentum: Initial momentum of the target network, increased to 1 on a cosine; .99 [second-hand].
    """

    takes_width: ClassVar[bool] = True
    has_moments: ClassVar[bool] = True
    name: Literal["tico"] = "tico"
    covariance_weight: float = setting(8.0, "[0, 1e6]")
    moment_momentum: float = setting(0.9, "[0, 1)")
    target_momentum: float = setting(0.99, "[0, 1]")


class TiCo(Loss[TiCoConfig]):
    """Agreement with the target, and a penalty that moves rows towards the directions used least.

    Attributes:
        moment: C, without bias correction for its start at 0, as in the paper.
    """

    configs = (TiCoConfig,)

    def __init__(self, config: TiCoConfig | None = None, *, projector_dim: int, **settings: Any) -> None:
        super().__init__(config, **settings)
        config = self.config
        self.moment = MovingMoment(projector_dim, config.moment_momentum)

    def forward(self, *z: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The loss, with C over the global batch; see `Loss`. In training mode C is updated with the batch."""
        rows, beta = stack_views(*z), self.moment.momentum
        with torch.autocast(rows.device.type, enabled=False):
            u = unit_rows(rows)
            batch_moment = second_moment(u.detach())  # B
            moment = beta * self.moment.average.to(u) + (1 - beta) * batch_moment
            if self.training:
                self.moment.update(batch_moment)
            repulsion = (u * (u @ moment)).sum(-1).mean()
        cosine = mean_cosine(rows, torch.stack(list(targets)))
        return 1 - cosine + self.config.covariance_weight * repulsion
