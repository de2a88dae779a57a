"""What a pipeline yields: the raw batch of an engine and the finished batch of a loader."""

# B local batch, V views, Vg views of one output size, H and W their height and width in pixels

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from kernels.augment import StoredImages


@dataclass(frozen=True)
class RawBatch:
    """One batch as an engine leaves it: decoded, cropped and resized, nothing else.

    Attributes:
        views: For each output size, in the order of `views.size_groups`, one uint8 array [B, Vg, H, W, 3] (RGB), or
            the same as a tensor on the device, or the images there of which the pixel op cuts the views.
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
    """Where a training's batches come from: `pipelines.loader.Loader`, or `pipelines.iterable_loader.IterableLoader`.

    Attributes:
        num_samples: Images of an epoch, over all ranks.
    """

    num_samples: int

    @property
    def view_shapes(self) -> list[tuple[int, int, int]]:
        """[3, H, W] of each view."""
        ...

    @property
    def identity(self) -> list[int]:
        """Numbers that a resumed run must find again, such as images and bytes of the file."""
        ...

    @property
    def num_bad_samples(self) -> int:
        """Images that turned out damaged so far."""
        ...

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch (>= 0) from `first_batch` on, on the device."""
        ...

    def close(self) -> None:
        """Stop what runs in the background."""
        ...
