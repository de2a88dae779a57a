"""What a training step minimises: model, loss and, where the loss wants one, a target network."""

# B local batch, H and W a view's height and width, F features, D projection, V views

import itertools
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.losses import Loss
from fastssl.models.activation_checkpointing import checkpoint_activations
from fastssl.models.ema import Ema
from fastssl.models.grad_cache import encode_in_micro_batches, unchanged_buffers
from fastssl.models.sync_batch_norm import has_batch_norm, synchronize_batch_norms
from fastssl.models.two_view import TwoViewModel
from fastssl.schedules import ema_momentum


class Objective(nn.Module):
    """The one module that the engine trains: all of it is moved, saved and restored together.

    What the loss learns (a temperature, a predictor) is trained, averaged over ranks and clipped with the model. The
    target has no gradients; its weights are fp32 whatever the precision, `follow` moves them. It takes batch
    norm's statistics from the batch, as the online network does.

    Attributes:
        model: Images to features and projections.
        loss: Projections to a scalar.
        target: The moving average of `model`, where the loss's config has a `target_momentum`; else None.
        num_micro_batches: In how many parts a batch is encoded, see `fastssl.models.grad_cache`.
    """

    def __init__(self, model: TwoViewModel, loss: Loss, *, num_micro_batches: int = 1) -> None:
        super().__init__()
        self.num_micro_batches = num_micro_batches
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
            h, z = self._encode(self.model, views)
            return h, z, self.loss(*z)
        with torch.no_grad():
            _, targets = self._encode(self.target, leading_views(views))
        h, z = self._encode(self.model, views)
        return h, z, self.loss(*z, targets=targets)

    def target_momentum(self, step: int, total_steps: int) -> float | None:
        """Momentum of the target after a step; None: there is no target.

        Args:
            step: Of the optimizer step, from 0.
            total_steps: Of the run: the momentum rises to 1 there.
        """
        return None if self._momentum is None else ema_momentum(step, total_steps, self._momentum)

    def after_step(self, step: int, total_steps: int) -> None:
        """Let the target follow the model after an optimizer step that was taken, see `target_momentum`."""
        momentum = self.target_momentum(step, total_steps)
        if momentum is not None:
            device = next(self.parameters()).device
            self.follow(torch.full((), 1.0 - momentum, device=device))

    def follow(self, weight: Tensor) -> None:
        """Let the target follow the model after a step; the engine calls nothing of itself.

        Args:
            weight: 1 - `target_momentum`, fp32, 0-dim on the device; 0 after a step that was not taken.
        """
        if self._ema is not None:
            self._ema.follow(self.model, weight)

    def _encode(self, model: nn.Module, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.num_micro_batches == 1:
            return model(views)
        return encode_in_micro_batches(model, views, self.num_micro_batches)


def build_objective(cfg: Config, model: TwoViewModel, loss: Loss) -> Objective:
    """The objective as the config wants it run; model and loss are changed in place (all ranks call it).

    Raises:
        ConfigError: the batch, the backbone or the machine do not allow what the config asks for.
    """
    try:
        if cfg.model.batch_norm == "sync":
            synchronize_batch_norms(nn.ModuleList([model, loss]))
        if cfg.model.activation_checkpointing:
            checkpoint_activations(model.backbone, cfg.model.backbone)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    objective = Objective(model, loss, num_micro_batches=cfg.train.num_micro_batches)
    _check_micro_batches(cfg, objective)
    if cfg.train.compile:
        _compile(objective)
    return objective


def during_backward(cfg: Config, objective: Objective) -> AbstractContextManager[None]:
    """Where a backward pass runs that may encode the batch again: its images must not be counted twice."""
    if cfg.train.num_micro_batches > 1 or cfg.model.activation_checkpointing:
        return unchanged_buffers(objective.model)
    return nullcontext()


def _compile(objective: Objective) -> None:
    """Compile the networks in place, names stay; a loss exchanges between ranks and has kernels of its own."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"train.compile: there is no C++ compiler {compiler}: install one, or name it in CXX")
    for network in (objective.model, objective.target):
        if network is not None:
            network.compile(dynamic=False)


def _check_micro_batches(cfg: Config, objective: Objective) -> None:
    num_parts, local_batch_size = cfg.train.num_micro_batches, cfg.data.global_batch_size // dist.world_size()
    if local_batch_size % num_parts:
        raise ConfigError(
            f"train.num_micro_batches is {num_parts}, which does not divide the local batch of {local_batch_size} "
            f"images (data.global_batch_size {cfg.data.global_batch_size} on {dist.world_size()} processes)"
        )
    if num_parts == 1 or not has_batch_norm(objective.model):
        return
    if local_batch_size == num_parts:
        raise ConfigError(
            f"train.num_micro_batches is {num_parts}: micro-batches of one image leave batch norm without statistics; "
            f"lower it, or raise data.global_batch_size"
        )
    if dist.rank() == 0:
        print(
            f"fastssl: warning: train.num_micro_batches={num_parts}: batch norm takes its statistics from parts of "
            f"{local_batch_size // num_parts} images, so this is not the training of the whole batch at once",
            file=sys.stderr,
            flush=True,
        )


def leading_views(views: list[Tensor]) -> list[Tensor]:
    """The first view and those of its size that follow it: what a target sees, the large crops of a multi-crop."""
    return list(itertools.takewhile(lambda view: view.shape == views[0].shape, views))
