"""The speed ceiling: random views made once, without decoding. No run can be faster than with this engine."""

from collections.abc import Generator

import numpy as np

from pipelines.batch import RawBatch
from pipelines.beton import BetonReader
from pipelines.engines import DrawBatch, Groups


class SyntheticEngine:
    """Yields the same random pixels for every batch, with the real draw, labels and ids."""

    def __init__(self, reader: BetonReader) -> None:
        self._reader = reader

    def batches(
        self, sample_ids: np.ndarray, local_batch_size: int, draw_batch: DrawBatch, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        rng = np.random.default_rng(0)
        shapes = [(local_batch_size, len(members), size_px, size_px, 3) for size_px, members in groups]
        pixels = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        for first in range(0, len(sample_ids), local_batch_size):
            ids = sample_ids[first : first + local_batch_size]
            params = draw_batch(ids, self._reader.sizes[ids])
            views = [array[: len(ids)] for array in pixels]
            yield RawBatch(views=views, params=params, labels=self._reader.labels[ids], sample_ids=ids)

    def close(self) -> None:
        """Nothing to stop."""
