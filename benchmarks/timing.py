"""The time of one call: of the device, measured with events, and of the host that launches it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# The device is kept busy this long before a call, so that most calls are fully queued and it waits for no launch.
_BUSY_CYCLES = 2_000_000  # about 1.2 ms


class CallTime(NamedTuple):
    """The milliseconds of a call.

    Attributes:
        ms: CUDA: from the start of its first kernel to the end of its last kernel. CPU: the duration of the call.
        host_ms: Time until the call returned. If it exceeds `ms` on CUDA, the device would wait for launches.
    """

    ms: float
    host_ms: float


def time_call(call: Callable[[], object], device: torch.device) -> CallTime:
    """Time one call, which starts after all earlier work is done."""
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
