"""Step reports for the host, read one step late, so that the host does not wait for the device."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl import collectives
from fastssl.step.train_step import StepResult


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The values of one step, on the host.

    Attributes:
        step: Number of the step, starting at 1.
        taken: Whether the step was taken; the same on all ranks.
        loss: Mean over ranks.
        grad_norm: Gradient norm before clipping.
        must_stop: Whether any rank was asked to stop; the same on all ranks.
        must_save: Whether a checkpoint is due by the first rank's clock; the same on all ranks.
        is_searching: Whether the initial search for fp16's loss scale was still running.
        sample_ids: Sample ids of the local batch, int64 [B], on the device.
        settings: Further values for the row of metrics: learning rate, loss scale.
    """

    step: int
    taken: bool
    loss: float
    grad_norm: float
    must_stop: bool
    must_save: bool
    is_searching: bool
    sample_ids: Tensor
    settings: dict[str, float]


class LateReports:
    """Copies each step's report to pinned memory, and returns it after a later step has been launched."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Per step: the values being copied to the host, the event that ends the copy (CUDA), the fields known already.
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, dict[str, Any]]] = deque()
        self._free: list[Tensor] = []

    def add(
        self,
        result: StepResult,
        *,
        step: int,
        wants_stop: bool,
        wants_save: bool,
        is_searching: bool,
        sample_ids: Tensor,
        settings: dict[str, float],
    ) -> None:
        """Start copying the report of the step just launched (all ranks call it; requests are combined by OR)."""
        values = result.report
        if collectives.world_size() > 1:
            wishes = (torch.full_like(result.loss, float(wish)) for wish in (wants_stop, wants_save))
            shared = torch.stack((result.loss, *wishes))
            collectives.EXCHANGE.sum_(shared)
            values = torch.stack((values[0], shared[0] / collectives.world_size(), values[2], shared[1], shared[2]))
        event = None
        if self._device.type != "cuda":
            host = values.clone()
        else:
            host = self._free.pop() if self._free else torch.empty(5, pin_memory=True)
            host[: len(values)].copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        known = {
            "step": step,
            "must_stop": wants_stop,  # of this process; several processes agree below
            "must_save": wants_save,
            "is_searching": is_searching,
            "sample_ids": sample_ids.clone(),  # on the CPU it may be an engine's array, which is reused
            "settings": settings,
        }
        self._waiting.append((host, event, known))

    def read(self, *, keep: int) -> Iterator[StepReport]:
        """Yield the reports in order, except those of the last `keep` steps."""
        while len(self._waiting) > keep:
            host, event, known = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            taken, loss, grad_norm, *wishes = host.tolist()
            if event is not None:
                self._free.append(host)
            values = {"taken": taken > 0, "loss": loss, "grad_norm": grad_norm}
            if collectives.world_size() > 1:
                must_stop, must_save = (wish > 0 for wish in wishes)
                values |= {"must_stop": must_stop, "must_save": must_save}
            yield StepReport(**known | values)
