"""What a training step minimises: model, loss and, if the loss needs one, a target network."""

# B local batch, H and W a view's height and width, F features, D projection, V views

import itertools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastssl.losses import Loss
from fastssl.models.ema import Ema
from fastssl.models.grad_cache import encode_in_micro_batches, unchanged_buffers
from fastssl.models.two_view import TwoViewModel
from fastssl.optim.schedules import ema_momentum


class Objective(nn.Module):
    """The single module that the engine trains; it is moved, saved and restored as a whole.

    The loss's parameters (a temperature, a predictor) are trained, averaged over ranks and clipped with the model's.
    The target has no gradients; its weights are fp32 in every precision and are updated by `follow`. Like the online
    network, it uses the batch-norm statistics of the batch.

    Attributes:
        model: Maps images to features and projections.
        loss: Maps projections to a scalar.
        target: The moving average of `model` if the loss has a `target_momentum`; else None.
        num_micro_batches: Number of parts in which a batch is encoded, see `fastssl.models.grad_cache`.
        recomputes: Whether the backward pass encodes the images a second time.
    """

    def __init__(
        self, model: TwoViewModel, loss: Loss, *, num_micro_batches: int = 1, checkpoints_activations: bool = False
    ) -> None:
        super().__init__()
        self.num_micro_batches = num_micro_batches
        self.recomputes = num_micro_batches > 1 or checkpoints_activations
        self.model = model
        self.loss = loss
        self._momentum = loss.target_momentum
        self._ema = None if self._momentum is None else Ema(model)
        self.target = None if self._ema is None else self._ema.module

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Features of each view, V tensors [B, F], projections, V tensors [B, D], and this rank's loss, 0-dim.

        Args:
            views: V tensors [B, 3, H, W], channels-last in memory.
        """
        if self.target is None:
            h, z = self._encode(self.model, views)
            return h, z, self.loss(*z)
        with torch.no_grad():
            _, targets = self._encode(self.target, leading_views(views))
        h, z = self._encode(self.model, views)
        return h, z, self.loss(*z, targets=targets)

    def target_momentum(self, step: int, total_steps: int) -> float | None:
        """Momentum for updating the target after a step; None: there is no target.

        Args:
            step: Number of the optimizer step, starting at 0.
            total_steps: Number of steps of the run; the momentum reaches 1 there.
        """
        return None if self._momentum is None else ema_momentum(step, total_steps, self._momentum)

    def follow(self, weight: Tensor) -> None:
        """Update the target after a step. Must be called explicitly: the engine does not do it.

        Args:
            weight: 1 - `target_momentum`, fp32, 0-dim on the device; 0 after a skipped step.
        """
        if self._ema is not None:
            self._ema.follow(self.model, weight)

    def preserve_buffers(self) -> AbstractContextManager[None]:
        """Context for the backward pass, so that batch norm does not count images twice if they are re-encoded."""
        return unchanged_buffers(self.model) if self.recomputes else nullcontext()

    def _encode(self, model: nn.Module, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.num_micro_batches == 1:
            return model(views)
        return encode_in_micro_batches(model, views, self.num_micro_batches)


def leading_views(views: list[Tensor]) -> list[Tensor]:
    """The first view and the following views of equal size: the target's input, the large crops of multi-crop."""
    return list(itertools.takewhile(lambda view: view.shape == views[0].shape, views))
