"""Reads a sharded data set in lanes: windows of blocks, the next one under way while one is in use."""

# n samples, G global batch, W world size

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import cache

import numpy as np

from pipelines.epoch_order import Group, num_together
from pipelines.errors import DataError
from pipelines.order.lanes import LaneOrder
from pipelines.samples import Samples
from pipelines.shards.pieces import LocalFiles, Piece, RemoteFiles
from pipelines.shards.rows import ROW
from pipelines.shards.sharded_images import ShardedImages, to_samples

_ENDED = "this epoch was ended"
_POLL_S = 0.2
_STEPS_LOOKED_AT = 16  # of a window, to fetch first what is needed first


def check_lanes(num_lanes: int, global_batch_size: int) -> None:
    """Raise DataError if a global batch cannot be divided among the lanes."""
    if global_batch_size % num_lanes:
        raise DataError(
            f"data.lanes is {num_lanes}, which does not divide data.global_batch_size {global_batch_size}: change one "
            "of them"
        )


def check_ranks(num_lanes: int, world_size: int) -> None:
    """Raise DataError if the lanes cannot be divided among the processes."""
    if num_lanes % world_size:
        raise DataError(f"data.lanes is {num_lanes}, not a multiple of the {world_size} processes: change one of them")


class LanesOrder:
    """`epoch_order.EpochOrder` of a sharded data set in lanes, see `order.lanes.LaneOrder`."""

    def __init__(
        self,
        images: ShardedImages,
        *,
        global_batch_size: int,
        num_lanes: int,
        window_bytes: int,
        seed: int,
        drop_behind: bool = False,
    ) -> None:
        """Set the order.

        Args:
            images: The data set.
            global_batch_size: G.
            num_lanes: C, a divisor of G.
            window_bytes: Stored size of the images that all lanes mix at a time.
            seed: The run's seed.
            drop_behind: Drop used samples from the page cache.
        Raises:
            DataError: the numbers do not fit each other.
        """
        check_lanes(num_lanes, global_batch_size)
        self._images, self._size, self.num_lanes = images, global_batch_size, num_lanes
        self._seed, self._drop_behind = seed, drop_behind
        self._block_samples = images.block_samples_of(num_lanes)
        mean_bytes = images.manifest.image_bytes / images.num_samples
        self._window_blocks = max(1, round(window_bytes / (num_lanes * self._block_samples * mean_bytes)))
        if images.num_samples < num_lanes * self._block_samples:
            raise DataError(
                f"{images.path}: {images.num_samples} images are too few for {num_lanes} lanes: lower data.lanes"
            )
        self.num_batches = self._order_of(0).num_batches(global_batch_size)
        if not self.num_batches:
            raise DataError(
                f"data.global_batch_size is {global_batch_size}, but {images.path} holds {images.num_samples} images: "
                "lower it"
            )

    @property
    def window_bytes(self) -> int:
        """Stored size of a window over all lanes, about."""
        num = self.num_lanes * self._block_samples * self._window_blocks
        return round(num * self._images.manifest.image_bytes / self._images.num_samples)

    @property
    def first_batch_bytes(self) -> int:
        """What is fetched before the first global batch is there, about."""
        return self.bytes_before(self._size)

    def bytes_before(self, num_images: float) -> int:
        """What is fetched before the first `num_images` are there, about: a block for each, at most a window."""
        mean_bytes = self._images.manifest.image_bytes / self._images.num_samples
        return min(round(num_images * self._block_samples * mean_bytes), self.window_bytes)

    def epoch(self, epoch: int, first_batch: int, rank: int, world_size: int) -> LaneEpoch:
        """See `EpochOrder.epoch`."""
        return LaneEpoch(self, epoch, first_batch, self.stream(rank, world_size, goes_on=False))

    def stream(self, rank: int, world_size: int, *, goes_on: bool) -> LaneStream:
        """What reads one rank's lanes; `goes_on`: after the last window of an epoch it reads the next epoch's first."""
        lanes = self._order_of(0).lanes_of(rank, world_size)
        return LaneStream(
            self._images,
            self._order_of,
            lanes,
            slice_size=self.slice_size,
            drop_behind=self._drop_behind,
            goes_on=goes_on,
        )

    @property
    def slice_size(self) -> int:
        """Samples of a lane in a global batch."""
        return self._size // self.num_lanes

    def _order_of(self, epoch: int) -> LaneOrder:
        return LaneOrder(
            num_samples=self._images.num_samples,
            block_samples=self._block_samples,
            num_lanes=self.num_lanes,
            window_blocks=self._window_blocks,
            seed=self._seed,
            epoch=epoch,
        )


class LaneEpoch:
    """`epoch_order.EpochSamples` of one rank."""

    def __init__(self, order: LanesOrder, epoch: int, first_batch: int, stream: LaneStream) -> None:
        self._epoch, self._first_batch, self._stream = epoch, first_batch, stream
        self._num_batches, self._size = order.num_batches, order.slice_size

    def groups(self) -> Iterator[Group]:
        """See `EpochSamples.groups`."""
        size, num_lanes = self._size, len(self._stream.lanes)
        for steps in step_groups(self._first_batch, self._num_batches, size * num_lanes):
            places = range(steps.start * size, steps.stop * size)
            ids = self._stream.ids(self._epoch, places)  # of each lane: all its places
            ids = ids.reshape(num_lanes, len(steps), size).swapaxes(0, 1).reshape(-1)
            yield Group(self._stream.samples(self._epoch, places, ids), self._epoch)

    def end(self, num_batches: int) -> None:
        """See `EpochSamples.end`."""
        self._stream.end(self._epoch, (self._first_batch + num_batches) * self._size)

    def close(self) -> None:
        """See `EpochSamples.close`."""
        self._stream.close()


def step_groups(first: int, stop: int, local_batch_size: int) -> Iterator[range]:
    """Steps that are planned together; the first batch does not wait for what others need."""
    num = 1
    while first < stop:
        yield (steps := range(first, min(first + num, stop)))
        first, num = steps.stop, num_together(local_batch_size)


class LaneStream:
    """Reads some lanes of a data set: at most two windows at a time, and what is used of a third.

    Attributes:
        lanes: The lanes.
    """

    def __init__(
        self,
        images: ShardedImages,
        order_of: Callable[[int], LaneOrder],
        lanes: range,
        *,
        slice_size: int,
        drop_behind: bool,
        goes_on: bool,
    ) -> None:
        self._images, self._order_of, self.lanes = images, cache(order_of), lanes
        self._slice_size, self._drop_behind, self._goes_on = slice_size, drop_behind, goes_on
        self._windows: dict[tuple[int, int], Window | LocalWindow] = {}  # by epoch and number
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._is_first = True

    @property
    def places_per_lane(self) -> int:
        """Number of samples of each lane in an epoch."""
        return self._order_of(0).places_per_lane

    def ids(self, epoch: int, places: range) -> np.ndarray:
        """Samples at some places, int64 [lanes, places]."""
        return self._order_of(epoch).places(self.lanes, places.start, places.stop)

    def samples(self, epoch: int, places: range, ids: np.ndarray) -> Samples:
        """The samples `ids` of these places, in their order; damaged ones are replaced."""
        windows = self._order_of(epoch).windows_of(places.start, places.stop)
        opened = [self._window(epoch, number) for number in windows]
        if self._is_first:  # the next window must not share the network with what the first batch waits for
            self._is_first, samples = False, self._gather(ids, opened)
            self._window(epoch, windows.stop)
            return samples
        self._window(epoch, windows.stop)  # ahead
        return self._gather(ids, opened)

    def end(self, epoch: int, place: int) -> None:
        """All places before this one have been used."""
        with self._lock:
            done = [
                key
                for key in self._windows
                if (key[0], self._order_of(key[0]).window_places(key[1]).stop) <= (epoch, place)
            ]
            dropped = [self._windows.pop(key) for key in done]
        if self._drop_behind:
            for window in dropped:
                window.drop()

    def close(self) -> None:
        """Stop reading ahead."""
        with self._lock:
            self._is_over.set()
            for window in self._windows.values():
                window.cancel()
            self._windows.clear()

    def _window(self, epoch: int, number: int) -> Window | LocalWindow | None:
        """The window, which is read from now on; None past the last one."""
        if number >= self._order_of(epoch).num_windows:
            if not self._goes_on:
                return None
            epoch, number = epoch + 1, 0
        with self._lock:
            if (epoch, number) not in self._windows and not self._is_over.is_set():
                self._windows[epoch, number] = self._read(self._order_of(epoch), number)
            return self._windows.get((epoch, number))

    def _read(self, order: LaneOrder, number: int) -> Window | LocalWindow:
        ranges = np.concatenate([order.block_ranges(lane, number) for lane in self.lanes])
        if isinstance(self._images.files, LocalFiles):
            return LocalWindow(self._images, self._images.files, ranges)
        places = order.window_places(number)
        stop = min(places.stop, places.start + _STEPS_LOOKED_AT * self._slice_size)
        return Window(self._images, ranges, order.places(self.lanes, places.start, stop).T.reshape(-1), self._is_over)

    def _gather(self, ids: np.ndarray, windows: list[Window | LocalWindow | None]) -> Samples:
        if not self._images.is_remote:
            return self._images.samples(ids)
        ids = ids.copy()
        rows, addresses = np.empty(len(ids), ROW), np.empty(len(ids), np.uint64)
        is_missing = np.ones(len(ids), bool)
        owners: list[object] = []
        damaged: dict[int, str] = {}
        for window in windows:
            if isinstance(window, Window):
                is_missing[window.fill(ids, rows, addresses)] = False
                owners.append(window.owners)
                damaged |= window.damaged
        if is_missing.any():
            raise RuntimeError(_ENDED)
        positions = np.flatnonzero(np.isin(ids, list(damaged))) if damaged else ids[:0]
        for position in positions.tolist():
            ids[position], piece = self._images.substitute(int(ids[position]), damaged[int(ids[position])])
            rows[position], addresses[position] = piece.rows[0], piece.addresses[0]
            owners.append(piece.owners)
        return to_samples(ids, rows, addresses, tuple(owners))


class LocalWindow:
    """The blocks of one window of a rank's lanes on a local disk, which the system is asked for."""

    def __init__(self, images: ShardedImages, files: LocalFiles, ranges: np.ndarray) -> None:
        self._files = files
        self._spans = [span for first, stop in ranges.tolist() for span in images.spans(first, stop)]
        files.will_need(self._spans)

    def drop(self) -> None:
        """Drop its pages from the page cache."""
        self._files.drop(self._spans)

    def cancel(self) -> None:
        """What the system was asked for, it reads."""


class Window:
    """The blocks of one window of a rank's lanes, which are being fetched.

    Attributes:
        owners: What keeps the memory of what was read valid.
        damaged: Reason by id of images whose bytes are wrong, of the blocks that were waited for.
    """

    def __init__(
        self, images: ShardedImages, ranges: np.ndarray, first_ids: np.ndarray, is_over: threading.Event
    ) -> None:
        """Begin to fetch.

        Args:
            images: The data set.
            ranges: First sample of each block and the one after its last, int64 [num, 2], disjoint.
            first_ids: Samples in the order of their use, as far as known.
            is_over: Set when nobody needs them any more.
        """
        assert isinstance(images.files, RemoteFiles)
        files, self._is_over = images.files, is_over
        self._ranges = ranges[np.argsort(ranges[:, 0])]
        self._offsets = np.concatenate([[0], np.cumsum(self._ranges[:, 1] - self._ranges[:, 0])])
        self._rows = np.empty(self._offsets[-1], ROW)
        self._addresses = np.empty(self._offsets[-1], np.uint64)
        self._is_there = np.zeros(len(ranges), bool)
        self.owners: list[object] = []
        self.damaged: dict[int, str] = {}
        seen, at = np.unique(self._blocks_of(first_ids), return_index=True)
        in_use = seen[np.argsort(at)]
        in_order = np.concatenate([in_use, np.setdiff1d(np.arange(len(ranges)), in_use)])
        self._pieces: dict[int, list[Future[Piece]]] = {
            block: [files.submit(*span) for span in images.spans(*self._ranges[block].tolist())]
            for block in in_order.tolist()
        }

    def fill(self, ids: np.ndarray, rows: np.ndarray, addresses: np.ndarray) -> np.ndarray:
        """Fill in what lies in this window, and wait for it where it has not arrived; returns its positions in ids."""
        blocks = self._blocks_of(ids)
        positions = np.flatnonzero(ids < self._ranges[blocks, 1]) if len(self._ranges) else ids[:0]
        positions = positions[blocks[positions] >= 0]
        blocks = blocks[positions]
        for block in np.unique(blocks[~self._is_there[blocks]]).tolist():
            self._take(block)
        places = self._offsets[blocks] + ids[positions] - self._ranges[blocks, 0]
        rows[positions], addresses[positions] = self._rows[places], self._addresses[places]
        return positions

    def drop(self) -> None:
        """The memory goes with the last batch."""

    def cancel(self) -> None:
        """Do not read what has not begun."""
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.cancel()

    def _blocks_of(self, ids: np.ndarray) -> np.ndarray:
        """Index of the last block that begins at or before each id; -1: none."""
        return np.searchsorted(self._ranges[:, 0], ids, side="right") - 1

    def _wait_for(self, future: Future[Piece]) -> Piece:
        """A request may be repeated for a minute; who ends the epoch does not wait for that."""
        while not self._is_over.is_set():
            with suppress(TimeoutError):
                return future.result(timeout=_POLL_S)
        raise RuntimeError(_ENDED)

    def _take(self, block: int) -> None:
        """Wait for one block and put it into the tables."""
        at, first = int(self._offsets[block]), int(self._ranges[block, 0])
        for future in self._pieces.pop(block):
            piece = self._wait_for(future)
            stop = at + len(piece.rows)
            self._rows[at:stop], self._addresses[at:stop] = piece.rows, piece.addresses
            self.owners.append(piece.owners)
            self.damaged |= {first + position: reason for position, reason in piece.damaged.items()}
            first, at = first + len(piece.rows), stop
        self._is_there[block] = True
