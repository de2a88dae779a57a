"""The batch types: the raw batch of an engine and the finished batch of a loader."""

# B local batch, V views, Vg views of one output size, H and W their height and width in pixels

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from kernels.augment import StoredImages


@dataclass(frozen=True)
class RawBatch:
    """One batch as an engine yields it: decoded, cropped and resized, nothing else.

    Attributes:
        views: For each output size, in the order of `views.size_groups`: a uint8 array [B, Vg, H, W, 3] (RGB), the
            same as a tensor on the device, or `StoredImages` on the device, from which the pixel op crops the views.
        params: Drawn parameters, structured `kernels.augment.VIEW_PARAMS` [B, V].
        labels: int64 [B]; -1 where the sample has no label.
        sample_ids: int64 [B], indices into the .beton file.
    """

    views: Sequence[np.ndarray | Tensor | StoredImages]
    params: np.ndarray
    labels: np.ndarray
    sample_ids: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One batch on the device, ready for the network.

    Attributes:
        views: V tensors [B, 3, H, W], normalised, channels-last in memory, in the order of the view specs.
        labels: int64 [B]; -1 where the sample has no label.
        sample_ids: int64 [B], indices into the .beton file.
    """

    views: list[Tensor]
    labels: Tensor
    sample_ids: Tensor


class BatchSource(Protocol):
    """The source of training batches: `pipelines.loader.Loader` or `pipelines.iterable_loader.IterableLoader`.

    Attributes:
        num_samples: Images per epoch, over all ranks.
    """

    num_samples: int

    @property
    def view_shapes(self) -> list[tuple[int, int, int]]:
        """[3, H, W] of each view."""
        ...

    @property
    def identity(self) -> list[int]:
        """Numbers that must be the same in a resumed run, such as the file's number of images and bytes."""
        ...

    @property
    def bad_sample_ids(self) -> Collection[int]:
        """The damaged images that this rank has found so far."""
        ...

    def __len__(self) -> int:
        """Number of batches per epoch."""
        ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch (>= 0), starting at `first_batch`, on the device."""
        ...

    def close(self) -> None:
        """Stop all background work."""
        ...
