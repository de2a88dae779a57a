"""Output of a run while it trains: metrics.jsonl, TensorBoard, a progress bar. The only place with .item()."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from fastssl.machine.files import sync_file
from fastssl.tracking.json_lines import drop_rows_after, read_rows
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.trackers.feeder import Feeder
from fastssl.tracking.trackers.tracker import End
from pipelines.progress import Lines

T = TypeVar("T")

Value: TypeAlias = Tensor | float | int | list[float] | dict[str, int] | None


class StepTimer:
    """Wall time of the steps, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self._wait_s, self._num_images = 0.0, 0
        self._last: dict[str, tuple[float, float, int]] = {}

    def start(self) -> None:
        """Start counting, for every reader."""
        self._last = dict.fromkeys(("step", "epoch"), self._now())

    def waiting(self, batches: Iterable[T], num_images: int) -> Iterator[T]:
        """Yield from `batches`, timing how long the caller waits for each; num_images is the size of a batch."""
        batches = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._wait_s += time.perf_counter() - asked
            self._num_images += num_images
            yield batch

    def read(self, reader: Literal["step", "epoch"]) -> dict[str, float]:
        """Images per second and data-wait share since the last call by this reader."""
        then, now = self._last[reader], self._now()
        self._last[reader] = now
        elapsed_s, wait_s, num_images = (b - a for a, b in zip(then, now, strict=True))
        elapsed_s = max(elapsed_s, 1e-9)
        return {"img_per_s": round(num_images / elapsed_s, 1), "data_wait_fraction": round(wait_s / elapsed_s, 4)}

    def _now(self) -> tuple[float, float, int]:
        return time.perf_counter(), self._wait_s, self._num_images


class MetricsWriter:
    """Writes one row every `log_every_steps` steps, and one per epoch (rank 0; silent elsewhere).

    On resume, rows beyond the checkpoint's step are dropped, so that no step appears twice.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        start_step: int,
        steps_per_epoch: int,
        num_epochs: int,
        trackers: Sequence[str] = (),
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        drop_rows_after(folder.metrics, start_step)
        self._file = folder.metrics.open("a", buffering=1)
        self._feeder = Feeder(folder.path, folder.trackers, trackers)  # reads the file from its first row on
        self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=start_step + 1)
        self._steps_per_epoch = steps_per_epoch
        self._num_epochs = num_epochs
        self._bar = tqdm(
            total=steps_per_epoch * num_epochs,
            initial=start_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self._started, self._start_step = time.perf_counter(), start_step
        self._num_done, self._lines = start_step, Lines()

    def step_row(self, step: int, values: dict[str, Tensor | float | int | None]) -> None:
        """Write the row of a step (1-based: the number of steps done); loss None: the step was skipped."""
        row = {"step": step, "epoch": (step - 1) // self._steps_per_epoch} | {k: _plain(v) for k, v in values.items()}
        self._write(row, prefix="step")
        shown = f"loss {_shown(row['loss'])}  {row['img_per_s']:.0f} img/s  data wait {row['data_wait_fraction']:.0%}"
        self._bar.set_postfix_str(shown)

    def epoch_row(self, epoch: int, step: int, values: dict[str, Value]) -> None:
        """Write the row of an epoch (0-based) and, if there is no terminal, print it as a line.

        Loss None: all steps of the epoch were skipped. A list holds the counts of a histogram of similarities, in equal
        bins from -1 to 1, a dictionary counts by reason.
        """
        row: dict[str, Any] = {"kind": "epoch", "step": step, "epoch": epoch}
        row |= {k: _plain(v) for k, v in values.items()}
        self._write(row, prefix="epoch")
        if self._bar.disable:
            print(self._line(row), flush=True)
            self._lines.printed()

    def held_out_row(self, epoch: int, step: int, knn_top1: float) -> None:
        """Write the accuracy on held-out images at the end of an epoch (0-based) and print it as a line."""
        self._write({"kind": "held_out", "step": step, "epoch": epoch, "knn_top1": knn_top1}, prefix="held_out")
        self._bar.write(f"epoch {epoch + 1}/{self._num_epochs}  kNN top-1 {knn_top1:.1%} on held-out images")

    def advance(self) -> None:
        """Count a step that was launched: move the progress bar, or print a line now and then within a long epoch."""
        self._num_done += 1
        self._bar.update()
        if self._bar.disable and self._num_done % self._steps_per_epoch and self._lines.are_due():
            epoch, step = divmod(self._num_done, self._steps_per_epoch)
            where = f"epoch {epoch + 1}/{self._num_epochs}  step {step:,}/{self._steps_per_epoch:,}"
            print(f"{where}  left {self._left(self._num_done)}", flush=True)

    def sync(self) -> None:
        """Return when all rows are on disk."""
        sync_file(self._file)

    def close(self, end: End = "finished") -> None:
        """Stop writing; the trackers are told how the training ended."""
        self._bar.close()
        self._file.close()
        self._feeder.close(end)
        self._tensorboard.close()

    def _write(self, row: dict[str, Any], *, prefix: str) -> None:
        self._file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if isinstance(value, list):
                self._write_histogram(f"{prefix}/{key}", value, row["step"])
            elif isinstance(value, dict):
                self._tensorboard.add_scalar(f"{prefix}/{key}", sum(value.values()), row["step"])
            elif key not in ("kind", "step", "epoch") and value is not None:
                self._tensorboard.add_scalar(f"{prefix}/{key}", value, row["step"])

    def _write_histogram(self, name: str, counts: list[float], step: int) -> None:
        edges = np.linspace(-1, 1, len(counts) + 1)
        middles, weights = (edges[1:] + edges[:-1]) / 2, np.asarray(counts)
        self._tensorboard.add_histogram_raw(
            name,
            min=-1.0,
            max=1.0,
            num=int(weights.sum()),
            sum=float(weights @ middles),
            sum_squares=float(weights @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=weights.tolist(),
            global_step=step,
        )

    def _line(self, row: dict[str, Any]) -> str:
        online = "" if row.get("online_top1") is None else f"  online top-1 {row['online_top1']:.1%}"
        return (
            f"epoch {row['epoch'] + 1}/{self._num_epochs}  loss {_shown(row['loss'])}{online}"
            f"  {row['img_per_s']:.0f} img/s  data wait {row['data_wait_fraction']:.0%}"
            f"  left {self._left(row['step'])}"
        )

    def _left(self, step: int) -> timedelta:
        """Time to the end of the run, at this process's speed so far."""
        elapsed_s, num_done = time.perf_counter() - self._started, step - self._start_step
        return timedelta(seconds=round(elapsed_s / max(num_done, 1) * (self._bar.total - step)))


def best_held_out(path: Path) -> tuple[int, float] | None:
    """Step and accuracy of the best epoch by held-out images, the first of equals; None: the file has no such row."""
    rows = [row for row in read_rows(path, "step") if row.get("kind") == "held_out"]
    found = [(row["step"], row["knn_top1"]) for row in rows if isinstance(row.get("knn_top1"), float)]
    return max(found, key=lambda pair: pair[1], default=None)


def training_time(path: Path, global_batch_size: int) -> tuple[float, int] | None:
    """Seconds that the epochs took, as their rows say, and the images they read; None: the file has no whole epoch."""
    seconds, num_images, last_step = 0.0, 0, 0
    for row in read_rows(path, "step"):
        img_per_s = row.get("img_per_s")
        if row.get("kind") == "epoch" and isinstance(img_per_s, float) and img_per_s > 0 and row["step"] > last_step:
            num_new = (row["step"] - last_step) * global_batch_size
            seconds, num_images, last_step = seconds + num_new / img_per_s, num_images + num_new, row["step"]
    return (seconds, num_images) if num_images else None


def _shown(loss: Any) -> str:
    return "skipped" if loss is None else f"{loss:.4f}"


def _plain(value: Value) -> float | int | list[float] | dict[str, int] | None:
    if value is None or isinstance(value, list | dict):
        return value
    number = value.item() if isinstance(value, Tensor) else value
    return number if isinstance(number, int) else float(number)
