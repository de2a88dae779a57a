"""What a run makes of its hardware: arithmetic per image, and the time that a step spends in communication."""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl.collectives import world_size
from fastssl.models.objective import Objective, leading_views

# Dense peaks in TFLOP/s of 16-bit and of fp32 (TF32), by a pattern of the device's name; another has run.peak_tflops.
_PEAK_TFLOPS = {"A100": (312, 156), "H100 80GB HBM3": (989, 494.5), "H200$": (989, 494.5)}
_MATMUL_IN_BACKWARD = 2  # of the gradient by the inputs, and by the weights: each as much as the forward pass


def flops_per_image(objective: Objective, view_shapes: Sequence[tuple[int, int, int]]) -> float | None:
    """Floating-point operations that one image costs in a training step: convolutions and matrix products.

    Forward and backward of every view through backbone and projector, and the target's forward pass. What the loss
    costs grows with the batch and is left out; so is what is computed twice to save memory.

    Args:
        objective: On any device; a copy without memory is counted.
        view_shapes: [3, H, W] of every view.

    Returns:
        2 for every multiplication with its addition; None: the model cannot be run without its data.
    """
    views = [torch.empty(2, *shape, device="meta") for shape in view_shapes]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            online = copy.deepcopy(objective.model).to("meta").eval()  # a copy is not compiled where the original is
            online(views)
            online_flops = counter.get_total_flops()
            if objective.target is not None:
                online(leading_views(views))
            target_flops = counter.get_total_flops() - online_flops
    except (NotImplementedError, RuntimeError):  # a kernel that has no form without data
        return None
    return (online_flops * (1 + _MATMUL_IN_BACKWARD) + target_flops) / 2


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's peak in TFLOP/s at this precision; None: not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "fp32"] for part, peaks in _PEAK_TFLOPS.items() if re.search(part, name)), None)


class CommunicationClock:
    """Time that collectives take in one step, as torch's own profiler sees them (gloo's calls, NCCL's kernels).

    Where they overlap with computation, or with each other, all of it counts.

    Attributes:
        last_ms: Of the last measured step; None: none yet, or one process alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.last_ms: float | None = None

    @contextmanager
    def measured(self, is_due: bool) -> Iterator[None]:
        """Measure what runs inside, where it is due and there is more than one process."""
        if not is_due or world_size() == 1:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on stderr that it starts and stops
        # Not torch.profiler: importing what it can do takes seconds.
        is_cuda = self._device.type == "cuda"
        found = torch.autograd.profiler.profile(use_device="cuda" if is_cuda else None)
        with found:
            yield
        wanted = "nccl" if is_cuda else "gloo:"
        events = [event for event in found.function_events or () if event.name.lower().startswith(wanted)]
        spent_us = sum(event.device_time_total if is_cuda else event.time_range.elapsed_us() for event in events)
        self.last_ms = spent_us / 1000
