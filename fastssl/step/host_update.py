"""The update under ZeRO 1 and 2, in fp16, and for optimizers that cannot skip on the device: the host reads the norm.

fp16 is torch's autocast under DeepSpeed, with the loss scale kept here: in DeepSpeed 0.19.8 each ZeRO rank has its own
scaler. These see different overflows, and gradients of different scales would be averaged.
"""

import math
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from fastssl.config import TrainConfig
from fastssl.machine.private_api import disable_gradient_scalers, foreach, has_overflowed, set_loss_scale
from fastssl.models.objective import Objective
from fastssl.optim.skipping import match_layout
from fastssl.step.loss_scale import LossScale


class HostUpdate:
    """Backward and optimizer step of an engine at ZeRO stages 0 to 2; either all ranks take a step or all skip it.

    A skipped update changes neither weights nor the optimizer's state.

    Attributes:
        loss_scale: For fp16, else None.
        is_searching: Whether the initial search for a loss scale is still running: no step has been taken yet.
    """

    def __init__(self, engine: Any, objective: Objective, cfg: TrainConfig) -> None:
        self._engine = engine
        self._max_norm = cfg.grad_clip_norm
        self._is_partitioned = engine.zero_optimization()
        self._parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.loss_scale = LossScale() if cfg.precision == "fp16" else None
        self.is_searching = self.loss_scale is not None
        disable_gradient_scalers(engine)

    def bind(self) -> None:
        """Give the optimizer state the memory layout of its parameters; call again after loading."""
        if not self._is_partitioned:
            match_layout(self._engine.optimizer)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the loss times the scale, averaged over ranks by the engine."""
        if self.loss_scale is None:
            self._engine.backward(loss)
        elif self._is_partitioned:
            set_loss_scale(self._engine.optimizer, self.loss_scale.cur_scale)  # it unscales before it clips
            self._engine.backward(loss)
        else:
            self._engine.backward(loss * self.loss_scale.cur_scale)

    def step(self) -> tuple[Tensor, Tensor]:
        """Take the optimizer's step.

        Returns:
            Whether the step was taken (bool), and the gradient norm over all parameters before clipping (fp32;
            non-finite if the gradient was), both 0-dim on the device.
        """
        norm = self._partitioned_step() if self._is_partitioned else self._plain_step()
        if self.loss_scale is not None:
            self.loss_scale.update(has_overflowed=norm is None)
            self.is_searching = self.is_searching and norm is None and not self.loss_scale.is_least
        device = self._parameters[0].device
        taken = torch.full((), norm is not None, device=device)  # `full` fills on the device: no copy from the host
        return taken, torch.full((), math.nan if norm is None else norm, dtype=torch.float32, device=device)

    def count(self) -> None:
        """Does nothing: the engine counts its own steps."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the update: the loss scale of fp16."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.cur_scale}

    def state_dict(self) -> dict[str, Any]:
        """State of the loss scaler; empty without one."""
        if self.loss_scale is None:
            return {}
        return asdict(self.loss_scale) | {"is_searching": self.is_searching}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved loss scale."""
        if self.loss_scale is None:
            return
        self.loss_scale = LossScale(**{field.name: state[field.name] for field in fields(LossScale)})
        self.is_searching = state.get("is_searching", False)  # missing in older checkpoints

    def _plain_step(self) -> float | None:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        scale = 1.0 if self.loss_scale is None else self.loss_scale.cur_scale
        norm = torch.nn.utils.get_total_norm(gradients).item() / scale
        if not math.isfinite(norm):
            self._step_without_gradients()
            return None
        # The formula of DeepSpeed's ZeRO optimizers; at stage 0 DeepSpeed would clip gradients of the scaled loss.
        clip = max(1.0, (norm + 1e-6) / self._max_norm) if self._max_norm else 1.0
        if scale * clip != 1:
            foreach.mul_(gradients, 1 / (scale * clip))
        self._engine.step()
        return norm

    def _step_without_gradients(self) -> None:
        """Make the engine count a step without an optimizer step; NVIDIA apex's optimizers would count it too."""
        for parameter in self._parameters:
            parameter.grad = None
        groups = self._engine.optimizer.param_groups
        kept = [dict(group) for group in groups]
        self._engine.step()
        for group, before in zip(groups, kept, strict=True):
            group.clear()
            group.update(before)

    def _partitioned_step(self) -> float | None:
        self._engine.step()
        if has_overflowed(self._engine.optimizer):
            return None
        return float(self._engine.get_global_grad_norm())
