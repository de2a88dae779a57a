"""Model and loss as the one module that the engine trains."""

from torch import Tensor, nn

from fastssl.losses import Loss
from fastssl.models.two_view import TwoViewModel


class Objective(nn.Module):
    """What a training step minimises; parameters that the loss learns are trained, averaged and saved with the rest.

    Attributes:
        model: Images to features and projections.
        loss: Projections to a scalar.
    """

    def __init__(self, model: TwoViewModel, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Features of each view, V tensors [B, F], and the loss of this rank's rows, 0-dim.

        Args:
            views: V tensors [B, 3, H, W], channels-last in memory.
        """
        h, z = self.model(views)
        return h, self.loss(*z)
