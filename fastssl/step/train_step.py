"""One training step, from a batch to updated weights, as one function that can be captured in a CUDA graph.

Whether the step is taken is a tensor on the device, and all updates depend on it: if a gradient is not finite, weights,
optimizer state, buffers, target, probe and sums keep their values. With `DeviceUpdate` nothing here waits for the
device, and values that change from step to step are stored in tensors.
"""

# B local batch, F features, D projection

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastssl import collectives
from fastssl.config import Config
from fastssl.evaluation.probe import OnlineProbe
from fastssl.models.objective import Objective
from fastssl.optim.skipping import can_skip
from fastssl.step.device_update import DeviceUpdate
from fastssl.step.host_update import HostUpdate
from pipelines.batch import Batch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """The results of a step, on the device; those of a captured step are valid until the next step.

    Attributes:
        taken: bool, 0-dim: whether the step was taken.
        loss: Loss of this rank, fp32, 0-dim.
        grad_norm: Gradient norm before clipping, fp32, 0-dim; the same on all ranks.
        report: The three values above, fp32 [3], for the host to read.
        h: Features of each view [B, F], without gradient.
        z: Projections of each view [B, D], without gradient.
    """

    taken: Tensor
    loss: Tensor
    grad_norm: Tensor
    report: Tensor
    h: list[Tensor]
    z: list[Tensor]


class TrainStep:
    """Runs one training step per batch.

    Attributes:
        update: Backward and optimizer step: `HostUpdate` or `DeviceUpdate`.
        sums: fp64, 0-dim: "loss", "grad_norm", "num_steps" and the probe's counts, summed over the taken steps.
        probe: Linear probe trained alongside; None: no probe.
        is_direct: Whether DeepSpeed's engine is bypassed, because everything that it would do is done here.
    """

    def __init__(
        self,
        cfg: Config,
        engine: Any,
        objective: Objective,
        *,
        probe: OnlineProbe | None,
        is_holdout: Tensor | None,
        sums: dict[str, Tensor],
    ) -> None:
        """Choose the update.

        Args:
            cfg: The run's configuration.
            engine: DeepSpeed's engine for the objective.
            objective: The trained module, on its device.
            probe: On the same device.
            is_holdout: bool [M]: entry (sample id modulo M) says whether the probe must not learn from a sample; None
                without a probe.
            sums: Sums that each step adds to.
        """
        self._cfg, self._engine, self._objective = cfg, engine, objective
        self.probe, self._is_holdout, self.sums = probe, is_holdout, sums
        self._buffers = FlatBuffers(objective)
        is_host = bool(engine.zero_optimization()) or cfg.train.precision == "fp16" or not can_skip(engine.optimizer)
        self.update: HostUpdate | DeviceUpdate = (
            HostUpdate(engine, objective, cfg.train)
            if is_host
            else DeviceUpdate(
                engine,
                engine.optimizer,
                objective,
                max_norm=cfg.train.grad_clip_norm,
                alone=collectives.world_size() == 1 and not cfg.ds,
            )
        )
        self._target_weight = torch.zeros((), device=engine.device)  # 1 - momentum of the target
        self.is_direct = isinstance(self.update, DeviceUpdate) and self.update.is_alone

    def run(self, batch: Batch, *, learning_rate: float, target_momentum: float | None) -> StepResult:
        """Run one step.

        Args:
            batch: The local batch, on the device.
            learning_rate: Learning rate of this step.
            target_momentum: Momentum of the target's moving average; None: there is no target.
        """
        self.prepare(learning_rate, target_momentum)
        result = self.body(batch.views, batch.labels, batch.sample_ids)
        self.count()
        return result

    def prepare(self, learning_rate: float, target_momentum: float | None) -> None:
        """Write the values that change from step to step into tensors."""
        self.update.set_learning_rate(learning_rate)
        if target_momentum is not None:
            self._target_weight.fill_(1.0 - target_momentum)

    def forget_gradients(self) -> None:
        """Discard gradients that an unfinished step may have left."""
        for parameter in self._objective.parameters():
            parameter.grad = None

    def count(self) -> None:
        """Update the host's counters after a step."""
        self.update.count()

    def body(self, views: list[Tensor], labels: Tensor, sample_ids: Tensor) -> StepResult:
        """The step itself, the part captured in a CUDA graph.

        Args:
            views: V tensors [B, 3, H, W], channels-last in memory.
            labels: int64 [B].
            sample_ids: int64 [B].
        """
        self._buffers.keep()
        h, z, loss = self.forward(views)
        with self._objective.preserve_buffers():
            self.update.backward(loss)
        taken, grad_norm = self.update.step()
        self._buffers.put_back_unless(taken)
        # A weight of 0 leaves the target unchanged, since all values of the model are finite again here.
        self._objective.follow(torch.where(taken, self._target_weight, 0.0))
        loss, h, z = loss.detach().float(), [x.detach() for x in h], [x.detach() for x in z]
        values = {"loss": loss, "grad_norm": grad_norm, "num_steps": torch.ones_like(grad_norm)}
        if self.probe is not None and self._is_holdout is not None:
            values |= self.probe.step(h, labels, self._is_holdout[sample_ids % len(self._is_holdout)], taken)
        for name, value in values.items():
            self.sums[name].add_(torch.where(taken, value, 0))
        return StepResult(taken, loss, grad_norm, torch.stack((taken.float(), loss, grad_norm)), h, z)

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """See `Objective.forward`, in the run's precision."""
        if not self.is_direct:
            return self._engine(views)
        with self._autocast():
            return self._objective(views)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES.get(self._cfg.train.precision)
        return nullcontext() if dtype is None else torch.autocast(self._engine.device.type, dtype)


# cuDNN reads batch norm's statistics with vector loads and assumes the alignment of a fresh allocation.
_ALIGNMENT_BYTES = 256


def _padded(buffer: Tensor) -> Tensor:
    """The buffer flattened and zero-padded to a multiple of the alignment."""
    elements = _ALIGNMENT_BYTES // buffer.element_size()
    return torch.nn.functional.pad(buffer.reshape(-1), (0, -buffer.numel() % elements))


class FlatBuffers:
    """All buffers of a module as views of one flat tensor per dtype, so that copying them all is one kernel launch.

    The forward pass updates batch norm's statistics and moments; a skipped step must not leave its batch in them.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._flat: list[Tensor] = []
        part_of: dict[Tensor, Tensor] = {}
        for buffers in by_dtype.values():
            padded = [_padded(buffer) for buffer in buffers]
            flat, starts = torch.cat(padded), accumulate(map(len, padded), initial=0)
            for buffer, start in zip(buffers, starts, strict=False):
                # `.data` gives each its own version counter: autograd may have saved one while another is written.
                part_of[buffer] = flat[start : start + buffer.numel()].view(buffer.shape).data
            self._flat.append(flat)
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
                setattr(owner, name, part_of[buffer])
        self._kept = [flat.clone() for flat in self._flat]

    def keep(self) -> None:
        """Save the current values of the buffers."""
        for flat, kept in zip(self._flat, self._kept, strict=True):
            kept.copy_(flat)

    def put_back_unless(self, taken: Tensor) -> None:
        """Restore the saved values if `taken` (bool, 0-dim) is False."""
        for flat, kept in zip(self._flat, self._kept, strict=True):
            torch.where(taken, flat, kept, out=flat)
