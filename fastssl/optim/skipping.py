"""Skipping a step of an optimizer without a read on the host.

torch's fused SGD and AdamW skip a step where their attribute `found_inf` is 1: weights, momentum and step counts keep
their values. LARS and LAMB know no such thing: they are stepped, and put back where the step is not to be taken.
"""

# torch's own optimizers use its foreach operators, whose names are private.
# pyright: reportPrivateImportUsage=false

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastssl.optim.layerwise import LayerwiseOptimizer


@contextmanager
def skipped_unless(taken: Tensor, optimizer: Optimizer, undo: "Undo | None") -> Iterator[None]:
    """Inside, a step of the optimizer leaves no trace where `taken` is False.

    Args:
        taken: bool, 0-dim.
        optimizer: One of which `can_skip` is true.
        undo: Of this optimizer; None: it `is_fused`, and skips by itself.
    """
    if undo is not None:
        undo.keep()
        yield
        undo.put_back_unless(taken)
        return
    # fp32 and exactly 1: the fused kernels compare with 1, and AdamW's subtract it from the step count.
    optimizer.found_inf = (~taken).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    yield


class Undo:
    """Puts weights and state of an optimizer back on the device; costs a copy of both before and after the step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._values = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        self._values += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        self._kept = [value.clone() for value in self._values]

    @torch.no_grad()
    def keep(self) -> None:
        torch._foreach_copy_(self._kept, self._values)

    @torch.no_grad()
    def put_back_unless(self, taken: Tensor) -> None:
        for value, kept in zip(self._values, self._kept, strict=True):
            torch.where(taken, value, kept, out=value)


def can_skip(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer can be skipped, or put back, without a read on the host."""
    return is_fused(optimizer) or isinstance(optimizer, LayerwiseOptimizer)


def is_fused(optimizer: Optimizer) -> bool:
    """Whether it is one of torch's that skip by `found_inf`; its other forms raise."""
    is_torchs = type(optimizer) in (torch.optim.SGD, torch.optim.AdamW)
    return is_torchs and all(group.get("fused") for group in optimizer.param_groups)


def prepare_state(optimizer: Optimizer) -> None:
    """Make all state of an optimizer of which `can_skip` is true, in the layout of its parameters.

    State that the first step makes would lie in a CUDA graph's memory. And torch's fused SGD makes its momentum with
    `empty_like`, and leaves it so where its first step is skipped: the next one takes that for a momentum. Zeros give
    the first step that is taken the same bits. AdamW is captured only where its groups say that it can be; its fused
    kernel is the same either way.
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
    """Give state of a parameter's shape the strides of the parameter: fused kernels pair them by place in memory.

    Channels-last weights meet contiguous state in the checkpoint of a run under ZeRO, or on another device.
    """
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype, memory_format=torch.preserve_format).copy_(value)
