"""Skipping an optimizer step without a host synchronisation.

torch's fused SGD and AdamW skip a step if their attribute `found_inf` is 1: weights, momentum and step counts keep
their values. LARS and LAMB do not support this: they are stepped, and restored if the step is to be skipped.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastssl.machine.private_api import foreach, skip_fused_step_if
from fastssl.optim.layerwise import LayerwiseOptimizer


@contextmanager
def skipped_unless(taken: Tensor, optimizer: Optimizer, undo: "Undo | None") -> Iterator[None]:
    """Context in which a step of the optimizer has no effect if `taken` is False.

    Args:
        taken: bool, 0-dim.
        optimizer: An optimizer for which `can_skip` is true.
        undo: The `Undo` of this optimizer; None: the optimizer `is_fused` and skips by itself.
    """
    if undo is not None:
        undo.keep()
        yield
        undo.put_back_unless(taken)
        return
    skip_fused_step_if(optimizer, ~taken)
    yield


class Undo:
    """Restores weights and state of an optimizer on the device; costs a copy of both before and after the step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._values = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        self._values += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        self._kept = [value.clone() for value in self._values]

    @torch.no_grad()
    def keep(self) -> None:
        foreach.copy_(self._kept, self._values)

    @torch.no_grad()
    def put_back_unless(self, taken: Tensor) -> None:
        for value, kept in zip(self._values, self._kept, strict=True):
            torch.where(taken, value, kept, out=value)


def can_skip(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer can be skipped, or undone, without a host synchronisation."""
    return is_fused(optimizer) or isinstance(optimizer, LayerwiseOptimizer)


def is_fused(optimizer: Optimizer) -> bool:
    """Whether the optimizer is a fused torch optimizer, which supports skipping via `found_inf`; other forms raise."""
    is_torchs = type(optimizer) in (torch.optim.SGD, torch.optim.AdamW)
    return is_torchs and all(group.get("fused") for group in optimizer.param_groups)


def prepare_state(optimizer: Optimizer) -> None:
    """Create all state of an optimizer for which `can_skip` is true, in the memory layout of its parameters.

    State created in the first step would be in a CUDA graph's memory. Moreover, torch's fused SGD creates its momentum
    with `empty_like` and leaves it uninitialised if the first step is skipped, so the next step would use it as
    momentum. With zeros, the first taken step is bitwise the same. AdamW is captured only if its groups are marked as
    capturable; its fused kernel is the same either way.
    """
    match_layout(optimizer)
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = group["params"][0].is_cuda
        names = ["exp_avg", "exp_avg_sq"] if "betas" in group else ["momentum_buffer"] if group["momentum"] else []
        for p in group["params"]:
            state = optimizer.state[p]
            for name in names:
                if state.get(name) is None:
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if "betas" in group:
                step = state.get("step")
                state["step"] = torch.zeros((), device=p.device) if step is None else step.to(p.device, torch.float32)


@torch.no_grad()
def match_layout(optimizer: Optimizer) -> None:
    """Give state tensors the strides of their parameters: fused kernels pair elements by memory position.

    Channels-last weights can get contiguous state from the checkpoint of a run under ZeRO or on another device.
    """
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype, memory_format=torch.preserve_format).copy_(value)
