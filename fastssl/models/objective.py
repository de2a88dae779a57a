"""What a training step minimises: model, loss and, where the loss wants one, a target network."""

# B local batch, H and W a view's height and width, F features, D projection, V views

import itertools

import torch
from torch import Tensor, nn

from fastssl.losses import Loss
from fastssl.models.ema import Ema
from fastssl.models.two_view import TwoViewModel
from fastssl.schedules import ema_momentum


class Objective(nn.Module):
    """The one module that the engine trains: all of it is moved, saved and restored together.

    What the loss learns (a temperature, a predictor) is trained, averaged over ranks and clipped with the model. The
    target has no gradients; its weights are fp32 whatever the precision, `after_step` moves them. It takes batch
    norm's statistics from the batch, as the online network does.

    Attributes:
        model: Images to features and projections.
        loss: Projections to a scalar.
        target: The moving average of `model`, where the loss's config has a `target_momentum`; else None.
    """

    def __init__(self, model: TwoViewModel, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._momentum: float | None = getattr(loss.config, "target_momentum", None)
        self._ema = None if self._momentum is None else Ema(model)
        self.target = None if self._ema is None else self._ema.module

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Features of each view, V tensors [B, F], projections, V tensors [B, D], and this rank's loss, 0-dim.

        Args:
            views: V tensors [B, 3, H, W], channels-last in memory.
        """
        if self.target is None:
            h, z = self.model(views)
            return h, z, self.loss(*z)
        with torch.no_grad():
            _, targets = self.target(leading_views(views))
        h, z = self.model(views)
        return h, z, self.loss(*z, targets=targets)

    def after_step(self, step: int, total_steps: int) -> None:
        """Let the target follow the model; the engine calls nothing of itself.

        Args:
            step: Of the optimizer step that was just taken, from 0.
            total_steps: Of the run: the momentum rises to 1 there.
        """
        if self._ema is not None and self._momentum is not None:
            self._ema.update(self.model, ema_momentum(step, total_steps, self._momentum))


def leading_views(views: list[Tensor]) -> list[Tensor]:
    """The first view and those of its size that follow it: what a target sees, the large crops of a multi-crop."""
    return list(itertools.takewhile(lambda view: view.shape == views[0].shape, views))
