"""Hardware utilisation of a run: FLOPs per image, and the time that a step spends in communication."""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl.collectives import world_size
from fastssl.models.objective import Objective, leading_views

# Dense peak TFLOP/s in 16 bits and in fp32 (TF32), by a regex of the device name; for others, set run.peak_tflops.
_PEAK_TFLOPS = {"A100": (312, 156), "H100 80GB HBM3": (989, 494.5), "H200$": (989, 494.5)}
_MATMUL_IN_BACKWARD = 2  # gradients of inputs and of weights, each as much as the forward pass


def flops_per_image(objective: Objective, view_shapes: Sequence[tuple[int, int, int]]) -> float | None:
    """Floating-point operations per image in a training step: convolutions and matrix products only.

    Counts forward and backward of every view through backbone and projector, and the target's forward pass. The loss,
    whose cost grows with the batch, and recomputation to save memory are not counted.

    Args:
        objective: On any device; a copy on the meta device is measured.
        view_shapes: [3, H, W] of every view.

    Returns:
        The count, where a multiply-add counts as 2; None: the model cannot run on the meta device.
    """
    views = [torch.empty(2, *shape, device="meta") for shape in view_shapes]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            online = copy.deepcopy(objective.model).to("meta").eval()  # a copy is not compiled, even if the original is
            online(views)
            online_flops = counter.get_total_flops()
            if objective.target is not None:
                online(leading_views(views))
            target_flops = counter.get_total_flops() - online_flops
    except Exception:  # an operator without a meta kernel
        return None
    return (online_flops * (1 + _MATMUL_IN_BACKWARD) + target_flops) / 2


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The device's peak in TFLOP/s at this precision; None: unknown (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "fp32"] for part, peaks in _PEAK_TFLOPS.items() if re.search(part, name)), None)


class CommunicationClock:
    """Time that collectives take in one step, as measured by torch's profiler (gloo's calls, NCCL's kernels).

    Time that overlaps with computation, or with other collectives, counts in full.

    Attributes:
        last_ms: Communication time of the last measured step in ms; None: none measured yet, or a single process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.last_ms: float | None = None

    @contextmanager
    def measured(self, is_due: bool) -> Iterator[None]:
        """Measure the code inside, if `is_due` and there is more than one process."""
        if not is_due or world_size() == 1:
            yield
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it logs start and stop on stderr
        # Not torch.profiler, whose import takes seconds.
        is_cuda = self._device.type == "cuda"
        found = torch.autograd.profiler.profile(use_device="cuda" if is_cuda else None)
        with found:
            yield
        wanted = "nccl" if is_cuda else "gloo:"
        events = [event for event in found.function_events or () if event.name.lower().startswith(wanted)]
        spent_us = sum(event.device_time_total if is_cuda else event.time_range.elapsed_us() for event in events)
        self.last_ms = spent_us / 1000
