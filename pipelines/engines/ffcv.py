"""The default engine: decodes each sample of a .beton file once and crops all its views, some batches ahead.

Of FFCV it takes the file format and the compiled library, which decodes the JPEGs (`turbojpeg`).
"""

# B local batch, V views, Vg views of one output size S

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import NamedTuple

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.batch import RawBatch
from pipelines.engines import BatchPlan, Groups
from pipelines.engines.decode_crop import BatchDecoder, Decoding
from pipelines.samples import ImageSet, Samples


class FfcvEngine:
    """One thread takes the plans and starts the batches, in order; a pool of threads decodes them.

    Taking a plan makes its draw. In the consumer's thread, the decoding threads would soon be idle meanwhile.
    """

    def __init__(self, images: ImageSet, *, num_workers: int, prefetch_batches: int, bad_samples: BadSamples) -> None:
        """Start no thread yet.

        Args:
            images: The data set, open.
            num_workers: Decoding threads, >= 1.
            prefetch_batches: Batches made ahead of the consumer, >= 1.
            bad_samples: Records samples that cannot be decoded.
        Raises:
            DataError: the samples are JPEGs, and FFCV is not installed.
        """
        self._decoder = BatchDecoder(images, num_workers, bad_samples)
        self._num_ahead = prefetch_batches
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="fastssl-plan")
        self._ahead: deque[Future[_Started | None]] = deque()  # the batches of the current iteration
        # For each size, uint8 [slots, B, Vg, S, S, 3]; kept for the next iteration. A thread may hold its last task for
        # a moment longer than the iteration lasts, so that new arrays would not always take the place of the old ones.
        self._arrays: list[np.ndarray] = []

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        self._end_iteration()
        ahead = self._ahead
        num_slots = self._num_ahead + 1  # the consumer uses one of them
        shapes = [(num_slots, local_batch_size, len(members), size_px, size_px, 3) for size_px, members in groups]
        if shapes != [array.shape for array in self._arrays]:
            self._arrays = [np.empty(shape, np.uint8) for shape in shapes]
        planned = zip(plans, cycle(zip(*self._arrays, strict=True)), strict=False)

        def start_next() -> _Started | None:
            for plan, slot in planned:
                return self._start(plan, groups, slot)
            return None

        try:
            while True:
                while len(ahead) < num_slots:
                    ahead.append(self._planner.submit(start_next))
                started = ahead[0].result()
                if started is None:
                    return
                started.decoding.wait()
                ahead.popleft()
                samples = started.samples
                yield RawBatch(
                    views=started.views, params=started.params, labels=samples.labels, sample_ids=samples.ids
                )
                if ahead is not self._ahead:
                    raise RuntimeError("this iteration was ended by another one, or by close()")
        finally:
            _cancel(ahead)

    def close(self) -> None:
        """See `Engine.close`."""
        self._end_iteration()
        self._planner.shutdown()
        self._decoder.close()
        self._arrays = []

    def _end_iteration(self) -> None:
        _cancel(self._ahead)
        self._ahead = deque()

    def _start(self, plan: BatchPlan, groups: Groups, slot: tuple[np.ndarray, ...]) -> "_Started":
        samples, boxes = plan.samples.copy(), plan.params["crop_box"].copy()  # the decoder may write there
        views = tuple(array[: len(samples)] for array in slot)
        return _Started(views, plan.params, samples, self._decoder.start(samples, boxes, groups, views))


class _Started(NamedTuple):
    """A batch that is being decoded; its samples are final only afterwards."""

    views: tuple[np.ndarray, ...]
    params: np.ndarray
    samples: Samples
    decoding: Decoding


def _cancel(ahead: deque[Future[_Started | None]]) -> None:
    """Cancel the batches and wait until nothing is written any more, the last first: no thread begins with another."""
    while ahead:
        start = ahead.pop()
        if not start.cancel() and start.exception() is None and (started := start.result()):
            started.decoding.cancel()
