"""Plans of batches, as a loader hands them to its engine."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from pipelines.engines import BatchPlan
from pipelines.views import ViewSpec, draw


def plan_batches(
    draw_batch: Callable[[np.ndarray, np.ndarray], np.ndarray],
    sample_ids: np.ndarray,
    sizes: np.ndarray,
    local_batch_size: int,
) -> Iterator[BatchPlan]:
    """Plan the samples in order, B at a time.

    Args:
        draw_batch: (sample_ids [B], sizes [B, 2]) -> the draw [B, V].
        sample_ids: int64 [num].
        sizes: Height and width in pixels of all samples of the file, [N, 2].
        local_batch_size: B; the last batch may be smaller.
    """
    for first in range(0, len(sample_ids), local_batch_size):
        ids = sample_ids[first : first + local_batch_size]
        yield BatchPlan(ids, draw_batch(ids, sizes[ids]))


def draw_of(specs: Sequence[ViewSpec]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The draw of seed 7 and epoch 3."""
    return partial(draw, specs, 7, 3)
