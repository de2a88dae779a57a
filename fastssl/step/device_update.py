"""The update without ZeRO in fp32 and bf16: gradient norm, clipping, step and skipping stay on the device."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastssl.machine.private_api import count_bypassed_step, foreach
from fastssl.models.objective import Objective
from fastssl.optim.skipping import Undo, is_fused, prepare_state, skipped_unless


class DeviceUpdate:
    """Backward and optimizer step without a host synchronisation; see `HostUpdate` for the other cases.

    With several processes DeepSpeed's engine averages the gradients. With one process it has nothing to do and is
    bypassed, so that the update can be captured in a CUDA graph; its counters are still updated.
    """

    is_searching = False  # there is no loss scale to search for

    def __init__(
        self, engine: Any, optimizer: Optimizer, objective: Objective, *, max_norm: float, alone: bool
    ) -> None:
        """Prepare the state of the optimizer.

        Args:
            engine: DeepSpeed's engine, at stage 0.
            optimizer: The engine's optimizer; `fastssl.optim.skipping.can_skip` must hold for it.
            objective: The trained module.
            max_norm: Gradient norm to clip to; 0: no clipping.
            alone: Whether there is a single process and the engine has nothing else to do.
        """
        self._engine, self._optimizer, self._max_norm, self.is_alone = engine, optimizer, max_norm, alone
        self._parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self._learning_rate = torch.zeros((), device=self._parameters[0].device)
        self.bind()

    def bind(self) -> None:
        """Store references to the optimizer's groups and state; call again after loading, which replaces them."""
        prepare_state(self._optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate
        self._undo = None if is_fused(self._optimizer) else Undo(self._optimizer)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next step; rounded to fp32."""
        self._learning_rate.fill_(learning_rate)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the loss, averaged over ranks by the engine."""
        if self.is_alone:
            loss.backward()
        else:
            self._engine.backward(loss)

    def step(self) -> tuple[Tensor, Tensor]:
        """Take the optimizer's step; see `HostUpdate.step`."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        taken = norm.isfinite()
        if self._max_norm:
            # In fp64, rounded once. A non-finite gradient becomes NaN, and the step is skipped.
            clip = ((norm.double() + 1e-6) / self._max_norm).clamp_min(1.0)
            foreach.mul_(gradients, clip.reciprocal().to(norm.dtype))
        with skipped_unless(taken, self._optimizer, self._undo):
            if self.is_alone:
                self._optimizer.step()
            else:
                self._engine.step()
        for parameter in self._parameters:
            parameter.grad = None
        return taken, norm

    def count(self) -> None:
        """Update the counters of a bypassed engine."""
        if self.is_alone:
            count_bypassed_step(self._engine)

    def metrics(self) -> dict[str, float]:
        """Metrics of the update: none."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no loss scale."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""
