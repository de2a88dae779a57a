"""SimSiam: Chen and He 2021, arXiv:2011.10566, Eq. 2.

# z the projections, p = q(z) their predictions; sg(x): x without gradient; a, b two views

    L = -1/2 [cos(p_a, sg(z_b)) + cos(p_b, sg(z_a))]

With more than two views: the mean over all pairs of views, in both directions. (For its best result the paper keeps the
predictor's learning rate constant; here it follows the schedule, as that of all other parameters does.)
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fastssl.losses.base import Loss, LossConfig
from fastssl.losses.pairwise import stack_views
from fastssl.losses.predictor import build_predictor
from fastssl.losses.view_pairs import mean_cosine
from pipelines.config_field import setting


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig(LossConfig):
    """Settings of `SimSiam`.

    Attributes:
        name: Selects this loss.
        predictor_hidden: Width of the predictor's hidden layer: 512 in the paper, a quarter of its D.
    """

    takes_width: ClassVar[bool] = True
    name: Literal["simsiam"] = "simsiam"
    predictor_hidden: int = setting(512, "[1, 65536]")


class SimSiam(Loss[SimSiamConfig]):
    """Predicts the projection of another view; the target is the network itself, without gradient."""

    configs = (SimSiamConfig,)

    def __init__(self, config: SimSiamConfig | None = None, *, projector_dim: int, **settings: Any) -> None:
        super().__init__(config, **settings)
        config = self.config
        self.predictor: nn.Module = build_predictor(projector_dim, config.predictor_hidden)

    def forward(self, *z: Tensor) -> Tensor:
        """The loss of this rank's rows, in [-1, 1]; see `Loss`."""
        rows = stack_views(*z)
        predictions = self.predictor(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return -mean_cosine(predictions, rows)
