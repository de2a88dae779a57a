"""The samples of one rank in the order of an epoch, with what reads them ahead."""

# N samples, G global batch, B local batch, W world size

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from pipelines.beton import BetonReader
from pipelines.order.keyed import sample_at
from pipelines.read_ahead import ReadAhead
from pipelines.sampler import global_batches, local_rows, quasi_random_windows
from pipelines.samples import ImageSet, Samples

_TOGETHER = 2048  # samples
_KEYED_STREAM = (1 << 32) - 2  # not one of `order.lanes`


class Group(NamedTuple):
    """Samples of some whole local batches, and the epoch of their views: one, or that of each sample, int64 [n]."""

    samples: Samples
    epoch: int | np.ndarray


class EpochSamples(Protocol):
    """One rank's samples of one epoch, from some batch on."""

    def groups(self) -> Iterator[Group]:
        """The samples in order: whole local batches, several of them where batches are small."""
        ...

    def end(self, num_batches: int) -> None:
        """Called when so many batches have been used."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class EpochOrder(Protocol):
    """An order of a data set's samples, which depends on (seed, epoch) and not on ranks."""

    @property
    def num_batches(self) -> int:
        """Global batches of an epoch."""
        ...

    def epoch(self, epoch: int, first_batch: int, rank: int, world_size: int) -> EpochSamples:
        """One rank's share of one epoch, from batch `first_batch` on."""
        ...


def num_together(local_batch_size: int) -> int:
    """How many batches are planned at a time.

    A draw takes about 2 ms however small the batch is: as long as all other work on 256 CIFAR images.
    """
    return max(1, _TOGETHER // local_batch_size)


class FileOrder:
    """Random and quasi-random order of one .beton file."""

    def __init__(
        self,
        images: ImageSet,
        *,
        global_batch_size: int,
        seed: int,
        window_bytes: int | None,
        drop_behind: bool,
        reads_ahead: bool,
    ) -> None:
        """Set the order.

        Args:
            images: The file. Other data sets in memory have neither windows nor read-ahead.
            global_batch_size: G.
            seed: The run's seed.
            window_bytes: Size of the stored images of a quasi-random window; None: random order.
            drop_behind: Drop used samples from the page cache.
            reads_ahead: Whether the samples are read from the file at all.
        """
        self._images, self._size, self._seed = images, global_batch_size, seed
        self._window_bytes, self._drop_behind, self._reads_ahead = window_bytes, drop_behind, reads_ahead
        self.num_batches = images.num_samples // global_batch_size

    def epoch(self, epoch: int, first_batch: int, rank: int, world_size: int) -> _FileEpoch:
        """See `EpochOrder.epoch`."""
        images, windows = self._images, None
        if self._window_bytes is not None:
            assert isinstance(images, BetonReader)
            windows = quasi_random_windows(images.data_ptr, images.data_bytes, self._seed, epoch, self._window_bytes)
        batches = global_batches(np.arange(images.num_samples), self._seed, epoch, self._size, windows)
        rows = local_rows(batches[first_batch:], rank, world_size)
        read_ahead = None
        if self._reads_ahead and isinstance(images, BetonReader):
            read_ahead = ReadAhead(images, rows.reshape(-1), windows, drop_behind=self._drop_behind)
        return _FileEpoch(images, epoch, rows, read_ahead)


class KeyedOrder:
    """Random order of a data set of any size: no array is as long as it."""

    def __init__(
        self, images: ImageSet, *, global_batch_size: int, seed: int, read: Callable[[np.ndarray], Samples]
    ) -> None:
        """Set the order.

        Args:
            images: The data set.
            global_batch_size: G.
            seed: The run's seed.
            read: Gets samples by their ids, int64 [n], which lie far apart.
        """
        self._images, self._size, self._seed, self._read = images, global_batch_size, seed, read
        self.num_batches = images.num_samples // global_batch_size

    def epoch(self, epoch: int, first_batch: int, rank: int, world_size: int) -> _KeyedEpoch:
        """See `EpochOrder.epoch`."""
        return _KeyedEpoch(self, epoch, first_batch, rank, world_size)

    def samples(self, epoch: int, steps: range, rank: int, world_size: int) -> Samples:
        """One rank's samples of some global batches."""
        size = self._size // world_size
        positions = np.array(steps)[:, None] * self._size + rank * size + np.arange(size)
        return self._read(sample_at(positions, self._images.num_samples, self._seed, epoch, _KEYED_STREAM).reshape(-1))

    def together(self, world_size: int) -> int:
        """See `num_together`."""
        return num_together(self._size // world_size)


class _KeyedEpoch:
    """See `EpochSamples`."""

    def __init__(self, order: KeyedOrder, epoch: int, first_batch: int, rank: int, world_size: int) -> None:
        self._order, self._epoch, self._first_batch = order, epoch, first_batch
        self._rank, self._world_size = rank, world_size

    def groups(self) -> Iterator[Group]:
        """See `EpochSamples.groups`."""
        num, stop = self._order.together(self._world_size), self._order.num_batches
        for first in range(self._first_batch, stop, num):
            steps = range(first, min(first + num, stop))
            yield Group(self._order.samples(self._epoch, steps, self._rank, self._world_size), self._epoch)

    def end(self, num_batches: int) -> None:
        """Nothing is read ahead."""

    def close(self) -> None:
        """Nothing is read ahead."""


class _FileEpoch:
    """See `EpochSamples`."""

    def __init__(self, images: ImageSet, epoch: int, rows: np.ndarray, read_ahead: ReadAhead | None) -> None:
        self._images, self._epoch, self._rows, self._read_ahead = images, epoch, rows, read_ahead

    def groups(self) -> Iterator[Group]:
        """See `EpochSamples.groups`."""
        size = self._rows.shape[1]
        num = num_together(size)
        for first in range(0, len(self._rows), num):
            if self._read_ahead:
                self._read_ahead.begin(first * size)
            yield Group(self._images.samples(self._rows[first : first + num].reshape(-1)), self._epoch)

    def end(self, num_batches: int) -> None:
        """See `EpochSamples.end`."""
        if self._read_ahead:
            self._read_ahead.end(num_batches * self._rows.shape[1])

    def close(self) -> None:
        """See `EpochSamples.close`."""
        if self._read_ahead:
            self._read_ahead.close()
