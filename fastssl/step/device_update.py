"""The update without ZeRO in fp32 and bf16: norm, clipping, step and skipping stay on the device."""

# torch's own optimizers use its foreach operators, whose names are private.
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastssl.models.objective import Objective
from fastssl.optim.skipping import Undo, is_fused, prepare_state, skipped_unless


class DeviceUpdate:
    """Backward and optimizer step that read no value on the host; see `HostUpdate` for the other cases.

    With several processes DeepSpeed's engine averages the gradients. With one it has nothing to do, and is passed by,
    so that a CUDA graph can hold the update; its counters are moved all the same.
    """

    is_searching = False  # there is no loss scale to search for

    def __init__(
        self, engine: Any, optimizer: Optimizer, objective: Objective, *, max_norm: float, alone: bool
    ) -> None:
        """Prepare the state of the optimizer.

        Args:
            engine: DeepSpeed's, at stage 0.
            optimizer: The one that the engine steps, see `fastssl.optim.skipping.can_skip`.
            objective: What is trained.
            max_norm: Of the gradient, to clip to; 0: no clipping.
            alone: There is one process, and nothing else that the engine was asked to do.
        """
        self._engine, self._optimizer, self._max_norm, self.is_alone = engine, optimizer, max_norm, alone
        self._parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self._learning_rate = torch.zeros((), device=self._parameters[0].device)
        self.bind()

    def bind(self) -> None:
        """Take hold of the optimizer's groups and state; again after they were loaded, which replaces them."""
        prepare_state(self._optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate
        self._undo = None if is_fused(self._optimizer) else Undo(self._optimizer)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of the next step; rounded to fp32."""
        self._learning_rate.fill_(learning_rate)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over ranks by the engine."""
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
            # In fp64, rounded once. A gradient that is not finite becomes NaN, and is skipped.
            clip = ((norm.double() + 1e-6) / self._max_norm).clamp_min(1.0)
            torch._foreach_mul_(gradients, clip.reciprocal().to(norm.dtype))
        with skipped_unless(taken, self._optimizer, self._undo):
            if self.is_alone:
                self._optimizer.step()
            else:
                self._engine.step()
        for parameter in self._parameters:
            parameter.grad = None
        return taken, norm

    def count(self) -> None:
        """Move the counters of an engine that was passed by."""
        if self.is_alone:
            self._engine.global_steps += 1
            self._engine.micro_steps += 1
            self._engine.global_samples += self._engine.train_batch_size()

    def metrics(self) -> dict[str, float]:
        """What a row of metrics says of it: nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: there is no loss scale."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""
