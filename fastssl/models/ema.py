"""The exponential moving average of a module, kept in fp32."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """A copy of a module that follows it slowly.

    The copy is fp32 whatever the module is: at momentum .996 a bf16 copy does not move, because the step of .004
    times the difference is below half of bf16's spacing (8 bits) and is rounded away.

    Attributes:
        module: The averaged copy, without gradients; a target network or a module to evaluate.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).float().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, momentum: float) -> None:
        """Move to momentum * average + (1 - momentum) * module.

        Floating-point parameters and buffers are averaged; counters are copied.

        Args:
            module: The followed module, of the same structure, in any precision.
            momentum: In [0, 1]; 1 leaves the average as it is.

        Raises:
            ValueError: momentum outside of [0, 1].
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], not {momentum}")
        for average, value in zip(_tensors(self.module), _tensors(module), strict=True):
            if average.is_floating_point():
                average.lerp_(value.to(average), 1.0 - momentum)
            else:
                average.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The average under the module's own names, fp32."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved average."""
        self.module.load_state_dict(state)


def _tensors(module: nn.Module) -> itertools.chain[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
