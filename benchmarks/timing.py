"""The time of one call: of the device's work by its own events, and of the host's that starts it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# The device is kept busy so long before a call: most calls are in its queue by then, and no launch is waited for.
_BUSY_CYCLES = 2_000_000  # some 1.2 ms


class CallTime(NamedTuple):
    """Milliseconds of a call.

    Attributes:
        ms: CUDA: from the first of its kernels to the end of the last. CPU: the call.
        host_ms: Until the call returned; where it is the larger one on CUDA, the device would wait for launches.
    """

    ms: float
    host_ms: float


def time_call(call: Callable[[], object], device: torch.device) -> CallTime:
    """Time one call, which begins when all earlier work is done."""
    if device.type != "cuda":
        started_s = time.perf_counter()
        call()
        ms = (time.perf_counter() - started_s) * 1e3
        return CallTime(ms, ms)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_BUSY_CYCLES)
    started_s = time.perf_counter()
    begin.record()
    call()
    end.record()
    host_ms = (time.perf_counter() - started_s) * 1e3
    end.synchronize()
    return CallTime(begin.elapsed_time(end), host_ms)
