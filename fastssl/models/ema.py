"""The exponential moving average of a module, kept in fp32."""

import copy
import itertools

import torch
from torch import Tensor, nn

from fastssl.machine.private_api import foreach


class Ema:
    """An exponential moving average of a module's parameters and buffers.

    The copy is fp32 whatever the module's dtype is: at momentum .996 a bf16 copy would not move, because the step of
    .004 times the difference is below half of bf16's spacing (8 bits) and is rounded away.

    Attributes:
        module: The averaged copy, without gradients; a target network or a module to evaluate.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).float().requires_grad_(False)

    @torch.no_grad()
    def follow(self, module: nn.Module, weight: Tensor) -> None:
        """Update the average to (1 - weight) * average + weight * module, without a host synchronisation.

        Floating-point parameters and buffers are averaged; counters are copied.

        Args:
            module: The averaged module, of the same structure, in any precision; its values must be finite even if the
                weight is 0.
            weight: In [0, 1], fp32, 0-dim.
        """
        pairs = list(zip(_tensors(self.module), _tensors(module), strict=True))
        averages = [average for average, _ in pairs if average.is_floating_point()]
        values = [value.to(average) for average, value in pairs if average.is_floating_point()]
        # A list of weights, because `foreach.lerp_` reads a single 0-dim weight on the host.
        weights = [weight.to(average.dtype).expand_as(average) for average in averages]
        foreach.lerp_(averages, values, weights)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)


def _tensors(module: nn.Module) -> itertools.chain[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
