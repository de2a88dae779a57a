"""Plans of batches, as a loader hands them to its engine."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from pipelines.engines import BatchPlan
from pipelines.samples import ImageSet
from pipelines.views import ViewSpec, draw


def plan_batches(
    draw_batch: Callable[[np.ndarray, np.ndarray], np.ndarray],
    sample_ids: np.ndarray,
    images: ImageSet,
    local_batch_size: int,
) -> Iterator[BatchPlan]:
    """Plan the samples in order, B at a time.

    Args:
        draw_batch: (sample_ids [B], sizes [B, 2]) -> the draw [B, V].
        sample_ids: int64 [num].
        images: The data set.
        local_batch_size: B; the last batch may be smaller.
    """
    for first in range(0, len(sample_ids), local_batch_size):
        samples = images.samples(sample_ids[first : first + local_batch_size])
        yield BatchPlan(samples, draw_batch(samples.ids, samples.sizes))


def draw_of(specs: Sequence[ViewSpec]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The draw of seed 7 and epoch 3."""
    return partial(draw, specs, 7, 3)
