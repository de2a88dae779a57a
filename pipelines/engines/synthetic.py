"""The speed ceiling: random views made once, without decoding. No run can be faster than with this engine."""

from collections.abc import Generator, Iterator

import numpy as np

from pipelines.batch import RawBatch
from pipelines.engines import BatchPlan, Groups


class SyntheticEngine:
    """Yields the same random pixels for every batch, with the real draw, labels and ids."""

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        rng = np.random.default_rng(0)
        shapes = [(local_batch_size, len(members), size_px, size_px, 3) for size_px, members in groups]
        pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        for plan in plans:
            views = [array[: len(plan.samples)] for array in pixels]
            yield RawBatch(views=views, params=plan.params, labels=plan.samples.labels, sample_ids=plan.samples.ids)

    def close(self) -> None:
        """Nothing to stop."""
