"""Anybody's batches for a training: a torch DataLoader, or another iterable with a length."""

# B local batch, V views

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.errors import DataError

Item = Batch | Sequence[Tensor]


class Batches(Sized, Iterable[Item], Protocol):
    """Has a length, and can be iterated once an epoch."""


class IterableLoader:
    """Batches of an iterable, as `Trainer` takes them.

    An item is a `Batch`, or the views of one: V tensors [B, 3, H, W], floats, normalised. It may also be a pair (views,
    labels), as DataLoaders give it; the labels are not used. A resumed epoch draws the batches before its first one
    and throws them away, so a run resumes exactly only if the iterable gives the same batches again for an epoch.
    Where the iterable, its `sampler`, its `batch_sampler` or the sampler of that has a `set_epoch`, it is called before
    each epoch.

    Attributes:
        num_samples: Images of an epoch, over all ranks.
    """

    bad_sample_ids: tuple[int, ...] = ()

    def __init__(self, batches: Batches, *, device: torch.device, world_size: int = 1) -> None:
        """Look at the first batch.

        Args:
            batches: This rank's; iterated once for this, and once an epoch.
            device: Where they go.
            world_size: Ranks, each with batches of its own.

        Raises:
            DataError: There is no batch, or it is not what is described above.
        """
        self._batches, self._device = batches, device
        try:
            num_batches = len(batches)
        except TypeError:
            raise DataError("loader: it has no length, which is the number of steps of an epoch") from None
        first = next(iter(batches), None)
        if first is None or num_batches == 0:
            raise DataError("loader: it gives no batch")
        views = _views_of(first)
        self._local_batch_size = len(views[0])
        self._shapes = [tuple(view.shape[1:]) for view in views]
        self.num_samples = len(batches) * self._local_batch_size * world_size

    @property
    def local_batch_size(self) -> int:
        """B."""
        return self._local_batch_size

    @property
    def view_shapes(self) -> list[tuple[int, int, int]]:
        """[3, H, W] of each view."""
        return [(channels, height, width) for channels, height, width in self._shapes]

    @property
    def identity(self) -> list[int]:
        """Batches of an epoch and images of a batch."""
        return [len(self), self._local_batch_size]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._batches)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See `BatchSource`.

        Raises:
            DataError: A batch has other views or another size than the first one of the run, or there are fewer than
                the length says.
        """
        loader: Any = self._batches
        inner = getattr(loader, "batch_sampler", None)
        for owner in (loader, getattr(loader, "sampler", None), inner, getattr(inner, "sampler", None)):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        num_given = first_batch
        for item in islice(self._batches, first_batch, len(self)):
            yield self._finish(item, num_given)
            num_given += 1
        if num_given < len(self):
            raise DataError(f"loader: epoch {epoch} ended after {num_given} batches, its length is {len(self)}")

    def close(self) -> None:
        """Nothing to stop: the iterable is its owner's."""

    def _finish(self, item: Item, number: int) -> Batch:
        views = _views_of(item)
        size = self._local_batch_size
        if [tuple(view.shape) for view in views] != [(size, *shape) for shape in self._shapes]:
            found = ", ".join(str(list(view.shape)) for view in views)
            raise DataError(f"loader: batch {number} has views {found}, the first one has {size} images: drop the last")
        if isinstance(item, Batch):
            labels, sample_ids = self._to_device(item.labels), self._to_device(item.sample_ids)
        else:
            labels = torch.full((size,), -1, device=self._device)
            sample_ids = torch.arange(number * size, (number + 1) * size, device=self._device)
        views = [self._to_device(view).contiguous(memory_format=torch.channels_last) for view in views]
        return Batch(views=views, labels=labels, sample_ids=sample_ids)

    def _to_device(self, x: Tensor) -> Tensor:
        # A copy from memory that is not pinned would wait for the step before; of what is pinned, this makes no copy.
        x = x.pin_memory() if self._device.type == "cuda" and x.device.type == "cpu" else x
        return x.to(self._device, non_blocking=True)


def _views_of(item: Any) -> list[Tensor]:
    """The views of an item; see `IterableLoader`.

    Raises:
        DataError: It is something else.
    """
    if isinstance(item, Batch):
        return item.views
    if isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[0], (list, tuple)):
        item = item[0]  # (views, labels)
    views = list(item) if isinstance(item, (list, tuple)) else []
    if len(views) < 2 or not all(isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() for x in views):
        raise DataError(
            "loader: a batch must be at least two views, float tensors [B, 3, H, W], or a pair of these and labels, "
            f"got {_describe(item)}"
        )
    return views


def _describe(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor {list(item.shape)} of {str(item.dtype).removeprefix('torch.')}"
    if isinstance(item, (list, tuple)):
        return f"a {type(item).__name__} of {', '.join(map(_describe, item[:3])) or 'nothing'}"
    return type(item).__name__
