"""The last stage of a loader: the pixel op of a batch, and its transfer to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.views import ViewsConfig

if TYPE_CHECKING:
    import subprocess

    import torch

    from kernels.augment.cpu import OutputPool
    from pipelines.batch import Batch, RawBatch


class PixelOpAndTransfer:
    """Pixel op and transfer of one batch."""

    def __init__(
        self, groups: Sequence[tuple[int, list[int]]], views: ViewsConfig, device: torch.device, num_threads: int
    ) -> None:
        self._groups, self._device = groups, device
        self._side_stream: torch.cuda.Stream | None = None
        self._compilation: subprocess.Popen | None = None
        self._pools: list[OutputPool | None] = [None for _ in groups]
        if device.type == "cpu":  # GPU batches do not use numba
            from kernels.augment.cpu import OutputPool, compile_ahead

            self._compilation = compile_ahead()
            self._pools = [OutputPool() for _ in groups]
        self._options: dict[str, Any] = {"mean": views.mean, "std": views.std, "num_threads": num_threads}

    def each(self, raw_batches: Iterator[RawBatch]) -> Iterator[Batch]:
        """Finish one batch after the other; on a GPU, one batch ahead of the consumer and on a separate stream.

        The host only launches the work, so that the copies and the pixel op overlap with the previous training step.
        """
        if self._device.type != "cuda":
            yield from map(self, raw_batches)
            return
        import torch

        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self._device)
            self._side_stream.wait_stream(torch.cuda.current_stream(self._device))  # engine images are made there
        side = self._side_stream
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        while True:
            with torch.cuda.stream(side):
                raw = next(raw_batches, None)
                is_ready = torch.cuda.Event()
                ready = None if raw is None else (self(raw), is_ready)
                is_ready.record(side)
            if waiting is not None:
                yield _hand_over(*waiting)
            if ready is None:
                return
            waiting = ready

    def __call__(self, raw: RawBatch) -> Batch:
        from kernels.augment import augment
        from pipelines.batch import Batch

        if self._compilation is not None:
            self._compilation.wait()
            self._compilation = None
        finished: dict[int, torch.Tensor] = {}
        for (_, members), pixels, pool in zip(self._groups, raw.views, self._pools, strict=True):
            if self._device.type == "cuda" and isinstance(pixels, np.ndarray):  # a quarter of the size of float32
                pixels = self._to_device(pixels)
            finished |= zip(
                members, augment(pixels, raw.params[:, members], outputs=pool, **self._options), strict=True
            )
        return Batch(
            views=[finished[view] for view in sorted(finished)],
            labels=self._to_device(raw.labels),
            sample_ids=self._to_device(raw.sample_ids),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        import torch

        tensor = torch.from_numpy(array)
        # torch keeps the pinned memory until the copy is done; the engine may overwrite the array immediately.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def _hand_over(batch: Batch, is_ready: torch.cuda.Event) -> Batch:
    """Make the consumer's stream wait for the batch, and keep the batch's memory until that stream has used it."""
    import torch

    stream = torch.cuda.current_stream(batch.labels.device)
    stream.wait_event(is_ready)
    for tensor in (*batch.views, batch.labels, batch.sample_ids):
        tensor.record_stream(stream)
    return batch
