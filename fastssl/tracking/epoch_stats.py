"""Statistics of an epoch: sums over its steps on every rank, and the rows that the first rank writes from them."""

# B local batch, F backbone features, D projection

import math
import resource
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastssl import collectives
from fastssl.config import Config
from fastssl.errors import DivergedError
from fastssl.step.late_reports import StepReport
from fastssl.step.train_step import StepResult
from fastssl.tracking.representation import WINDOW_IMAGES, add_sums, representation_metrics, update_alarm, window_sums
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.throughput import CommunicationClock, peak_tflops
from fastssl.tracking.trackers.tracker import End
from fastssl.tracking.writers import MetricsWriter, StepTimer
from pipelines.printable import printable

# Each rank's sum of these describes the global batch; of image counts each rank has only its own part.
_MEANS = ("loss", "grad_norm", "num_steps")


class EpochStats:
    """Sums over the steps of an epoch, and over the window of its last steps that the diagnostics use.

    Attributes:
        timer: Times the steps and the waiting for data.
        metrics: The writer of rows; None on all ranks but the first, and before `open`.
        sums: fp64, 0-dim, on the device: sums over the steps of the epoch; `TrainStep` adds to these same tensors.
        collapsed_since: For each collapse signal, the epoch since which it has been on.
    """

    def __init__(
        self,
        cfg: Config,
        device: torch.device,
        *,
        steps_per_epoch: int,
        num_views: int,
        flops_per_image: float | None,
        bound_nats: Callable[[float], float | None],
        counts: Sequence[str] = (),
    ) -> None:
        """Start with empty sums; nothing is written before `open`.

        Args:
            cfg: The run's configuration.
            device: Device of the sums.
            steps_per_epoch: Optimizer steps per epoch.
            num_views: V.
            flops_per_image: From `fastssl.tracking.throughput.flops_per_image`.
            bound_nats: The loss's `bound_nats`: mean loss -> bound on the mutual information.
            counts: Names of further counts per step, in addition to loss, gradient norm and number of steps.
        """
        self.timer = StepTimer()
        self.metrics: MetricsWriter | None = None
        self.collapsed_since: dict[str, int] = {}
        self._cfg, self._device = cfg, device
        self._steps_per_epoch, self._num_views = steps_per_epoch, num_views
        self._flops_per_image, self._bound_nats = flops_per_image, bound_nats
        self._communication = CommunicationClock(device)
        self._names = (*_MEANS, *counts)
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in self._names}
        self._retries = Counter[str]()
        self._bad_samples: set[int] = set()  # of all ranks, as far as gathered; on the first one
        self._window: dict[str, Tensor] = {}
        self._window_steps = math.ceil(WINDOW_IMAGES / cfg.data.global_batch_size)

    def open(self, folder: RunFolder, step: int) -> None:
        """Start writing rows (first rank only), after the row of this step."""
        if collectives.rank() == 0:
            self.metrics = MetricsWriter(
                folder,
                start_step=step,
                steps_per_epoch=self._steps_per_epoch,
                num_epochs=self._cfg.train.num_epochs,
                trackers=self._cfg.run.trackers,
            )

    def close(self, end: End = "finished") -> None:
        """Stop writing rows; the trackers are told how the training ended."""
        if self.metrics:
            self.metrics.close(end)

    def communication_measured(self, step: int) -> AbstractContextManager[None]:
        """Measure communication in `step` (0-based) if it is an epoch's last but one; the first steps are warm-up."""
        return self._communication.measured((step + 2) % self._steps_per_epoch == 0)

    def add_to_window(self, result: StepResult, step: int) -> None:
        """Add a step to the window (all ranks), if it is one of the last steps of an epoch that is diagnosed.

        Args:
            result: Result of the step just launched; a skipped step adds nothing.
            step: Number of the step, starting at 1.
        """
        num_done = -(-step // self._steps_per_epoch)  # epochs at the end of this one
        is_due = num_done % self._cfg.run.diagnose_every_epochs == 0
        if is_due and -step % self._steps_per_epoch < self._window_steps:
            sums = window_sums(result.h, result.z)
            masked = {name: torch.where(result.taken, value, 0) for name, value in sums.items()}
            self._window = add_sums(self._window, masked)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self.metrics:
            self.metrics.advance()

    def speed_of_steps(self, step: int) -> dict[str, float]:
        """Throughput since the last row if a row is due at this step (1-based), else {}."""
        return {} if step % self._cfg.run.log_every_steps else self.timer.read("step")

    def write_step(self, report: StepReport) -> None:
        """Write the row of a step if one is due."""
        if self.metrics is None or report.step % self._cfg.run.log_every_steps:
            return
        row: dict[str, Any] = {"loss": None, "grad_norm": None}
        if report.taken:
            row = {"loss": report.loss, "grad_norm": report.grad_norm}
        row |= report.settings | {"memory_bytes": self._memory_bytes()}
        self.metrics.step_row(report.step, row)

    def end_epoch(
        self, step: int, bad_samples: Collection[int], remote_retries: Mapping[str, int] | None = None
    ) -> None:
        """Write the row of the epoch that ends with this step, and check for a collapse (all ranks).

        Args:
            step: Number of the step, starting at 1.
            bad_samples: The bad samples that this rank has found so far.
            remote_retries: How often this rank's requests were repeated so far, by reason; None on all ranks: nothing
                is fetched.
        Raises:
            DivergedError: The representation has collapsed, and train.on_collapse is stop.
        """
        sums = {name: collectives.all_mean_(value.clone()) for name, value in self.sums.items()}
        for value in self.sums.values():
            value.zero_()
        window, self._window = collectives.sum_all(self._window), {}
        num_bad = len(self.all_bad_samples(bad_samples))
        retries = {} if remote_retries is None else self._all_retries(remote_retries)
        epoch = step // self._steps_per_epoch - 1
        signals: list[str] = []
        if self.metrics:
            row = self._step_metrics(sums) | self._throughput()
            if num_bad:
                row["bad_samples_seen"] = num_bad
            if retries:
                row["remote_retries"] = retries
            if window and window["num_rows"] > 0:  # else no step of it was taken
                found = representation_metrics(window, num_views=self._num_views)
                signals = update_alarm(self.collapsed_since, found, epoch)
                row |= {name: value for name, value in found.items() if math.isfinite(value)}
                row |= {name: window[name].tolist() for name in ("positive_counts", "negative_counts")}
            self.metrics.epoch_row(epoch, step, row)
        self._raise_alarm(signals, step)

    def all_bad_samples(self, own: Collection[int]) -> list[int]:
        """The bad samples that any rank has found since the start of the run, ascending; only on the first rank."""
        for each in collectives.gather_on_first(list(own)) or ():
            self._bad_samples.update(each)
        return sorted(self._bad_samples)

    def _all_retries(self, own: Mapping[str, int]) -> dict[str, int]:
        """The sum over the ranks, on the first one; a line where it has risen. Empty on the others."""
        total = Counter[str]()
        for each in collectives.gather_on_first(dict(own)) or ():
            total.update(each)
        risen = total - self._retries
        if risen:
            reasons = ", ".join(f"{num:,} x {reason}" for reason, num in risen.most_common())
            line = f"fastssl: {risen.total():,} remote requests of this epoch were repeated: {reasons}"
            print(printable(line), file=sys.stderr, flush=True)
        self._retries = total
        return dict(total.most_common())

    def write_held_out(self, step: int, knn_top1: float) -> None:
        """Write the accuracy on held-out images after this step; the time it took is not counted as training."""
        if self.metrics:
            self.metrics.held_out_row(step // self._steps_per_epoch - 1, step, knn_top1)
        self.timer.start()

    def sync(self) -> None:
        """Return when all rows are on disk: rows must be written before their checkpoint is."""
        if self.metrics:
            self.metrics.sync()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """This rank's sums to be saved in a checkpoint."""
        return {"epoch": self.sums, "window": self._window}

    def restore(
        self,
        sums: dict[str, dict[str, Tensor]],
        collapsed_since: dict[str, int],
        world_size: int,
        bad_samples: Collection[int] = (),
    ) -> None:
        """Resume from a checkpoint.

        Args:
            sums: This rank's sums, on any device.
            collapsed_since: The saved value.
            world_size: World size of the run that saved them.
            bad_samples: What `all_bad_samples` returned.
        """
        for name, value in self.sums.items():
            value.copy_(sums["epoch"][name])
        for name in _MEANS:
            self.sums[name] *= collectives.world_size() / world_size
        self._window = {name: value.to(self._device) for name, value in sums["window"].items()}
        self.collapsed_since = collapsed_since
        self._bad_samples = set(bad_samples)

    def _step_metrics(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        num_taken = round(sums["num_steps"].item())
        row: dict[str, Any] = {"loss": None, "grad_norm": None, "skipped_steps": self._steps_per_epoch - num_taken}
        if num_taken:
            row |= {"loss": sums["loss"] / num_taken, "grad_norm": sums["grad_norm"] / num_taken}
            if (bound := self._bound_nats(row["loss"].item())) is not None:
                row["mutual_information_bound_nats"] = bound
        if "online_total" in sums and sums["online_total"] > 0:
            row["online_top1"] = sums["online_correct"] / sums["online_total"]
        return row

    def _throughput(self) -> dict[str, float | int]:
        """Metrics of the epoch: images per second, waiting for data, FLOPs, communication, memory."""
        row: dict[str, float | int] = {**self.timer.read("epoch"), "memory_bytes": self._memory_bytes()}
        if self._flops_per_image is not None:
            tflops = row["img_per_s"] * self._flops_per_image / collectives.world_size() / 1e12
            row["model_tflops_per_device"] = round(tflops, 4)
            if peak := self._cfg.run.peak_tflops or peak_tflops(self._device, self._cfg.train.precision):
                row["model_flop_utilisation"] = round(tflops / peak, 4)
        if self._communication.last_ms is not None:
            row["communication_ms_per_step"] = round(self._communication.last_ms, 3)
        return row

    def _raise_alarm(self, signals: list[str], step: int) -> None:
        if signals:
            line = f"fastssl: warning: the representation has collapsed: {'; '.join(signals)}"
            print(line, file=sys.stderr, flush=True)
        num_signals = collectives.EXCHANGE.sum_(torch.tensor(float(len(signals)), device=self._device))
        if self._cfg.train.on_collapse == "stop" and num_signals > 0:
            raise DivergedError(
                f"the representation has collapsed at step {step}, and train.on_collapse is stop: change the loss or "
                "optim.base_lr, or set train.on_collapse=warn"
            )

    def _memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
