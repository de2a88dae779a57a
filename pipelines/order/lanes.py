"""A quasi-random order of any number of samples in which every rank reads blocks of its own.

The samples, numbered through all shards, are cut into blocks of consecutive samples. A keyed order of the blocks deals
them in turn to a fixed number of lanes. A lane reads its blocks window by window and shuffles the samples of a window.
A global batch is the lanes' slices side by side. A rank takes a contiguous slice of it, which is whole lanes where the
world size divides the number of lanes: the order does not depend on the world size, and no two ranks read one block.
"""

# N samples, K samples in a block, C lanes, G global batch, W world size

from dataclasses import dataclass, field

import numpy as np

from pipelines.order.keyed import MAX_NUM, SMALL, sample_at, small_orders

_BLOCK_STREAM = 0
_LAST_BLOCK_STREAM = (1 << 32) - 1  # the window w of lane c has stream 1 + w * C + c
_NUM_TABLES = 3  # windows whose samples are kept: two that a batch may need, and the next


@dataclass(frozen=True)
class LaneOrder:
    """The order of one epoch, a pure function of the fields.

    Every sample occurs at most once. Fewer than K * C + G samples are left out: blocks that do not fill all lanes, the
    incomplete last batch, and N % K samples of the last block. They are others in each epoch. All blocks have the same
    samples in every epoch, so that they can be cached: K, and the last block K + N % K, of which an epoch uses K.

    Attributes:
        num_samples: N, in C * K .. 2**62.
        block_samples: K, >= 1.
        num_lanes: C, >= 1; it divides G, and W divides it.
        window_blocks: Blocks of a window in one lane, >= 1. The last window of a lane may have fewer.
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32).
    Raises:
        ValueError: a number is out of range.
    """

    num_samples: int
    block_samples: int
    num_lanes: int
    window_blocks: int
    seed: int
    epoch: int
    _tables: dict[tuple[int, int, int], np.ndarray] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        for name in ("block_samples", "num_lanes", "window_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        least = self.block_samples * self.num_lanes
        if not least <= self.num_samples <= MAX_NUM:
            raise ValueError(
                f"num_samples must be in {least} (a block of {self.block_samples} for each of {self.num_lanes} lanes) "
                f"..2**62, got {self.num_samples}"
            )
        if self.num_windows * self.num_lanes >= _LAST_BLOCK_STREAM - 1:
            raise ValueError(f"window_blocks {self.window_blocks} is too small for {self.num_samples} samples")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if not 0 <= self.epoch < 1 << 32:
            raise ValueError(f"epoch must be in [0, 2**32), got {self.epoch}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the data set; the last one also has the rest of the samples."""
        return self.num_samples // self.block_samples

    @property
    def blocks_per_lane(self) -> int:
        """Number of blocks that each lane reads in the epoch."""
        return self.num_blocks // self.num_lanes

    @property
    def num_windows(self) -> int:
        """Number of windows of each lane."""
        return -(-self.blocks_per_lane // self.window_blocks)

    def num_batches(self, global_batch_size: int) -> int:
        """Number of global batches of the epoch; 0 if G is larger than what all lanes have.

        Raises:
            ValueError: G is not a positive multiple of C.
        """
        return self.blocks_per_lane * self.block_samples // self._slice_size(global_batch_size)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes of one rank.

        Raises:
            ValueError: W does not divide C, or rank is out of range.
        """
        if world_size < 1 or self.num_lanes % world_size:
            raise ValueError(f"the number of lanes {self.num_lanes} is not a multiple of the world size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        num = self.num_lanes // world_size
        return range(rank * num, (rank + 1) * num)

    def batch(self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the samples of one rank in one global batch.

        The first batch of a window computes the window, which makes 0.1 to 0.4 us a sample for batches in sequence.

        Args:
            step: In [0, num_batches(G)).
            global_batch_size: G, a multiple of C.
            rank: In [0, W).
            world_size: W, a divisor of C.
        Returns:
            int64 [G / W]; their concatenation over the ranks is the global batch.
        Raises:
            ValueError: a number is out of range, or does not divide the other.
        """
        self.window_of(step, global_batch_size)  # checks the step
        size = self._slice_size(global_batch_size)
        return self.places(self.lanes_of(rank, world_size), step * size, (step + 1) * size).reshape(-1)

    @property
    def places_per_lane(self) -> int:
        """Number of samples of each lane in the epoch."""
        return self.blocks_per_lane * self.block_samples

    def places(self, lanes: range, start: int, stop: int) -> np.ndarray:
        """Return the samples at places start..stop-1 of some lanes, int64 [lanes, stop - start]."""
        window_size = self.window_blocks * self.block_samples
        parts = []
        for window in self.windows_of(start, stop):
            first = window * window_size
            parts.append(self.window_samples(lanes, window, max(start - first, 0), min(stop - first, window_size)))
        return np.concatenate(parts, axis=1)

    def windows_of(self, start: int, stop: int) -> range:
        """The windows of places start..stop-1."""
        window_size = self.window_blocks * self.block_samples
        return range(start // window_size, (stop - 1) // window_size + 1)

    def window_places(self, window: int) -> range:
        """The places of a window in its lane."""
        first, stop = self._blocks_in(window)
        return range(first * self.block_samples, stop * self.block_samples)

    def window_of(self, step: int, global_batch_size: int) -> range:
        """The windows that a global batch takes samples from, the same in every lane; often only one.

        Raises:
            ValueError: as `batch`.
        """
        num_batches = self.num_batches(global_batch_size)
        if not 0 <= step < num_batches:
            raise ValueError(f"step must be in [0, {num_batches}), got {step}")
        size, window_size = self._slice_size(global_batch_size), self.window_blocks * self.block_samples
        return range(step * size // window_size, ((step + 1) * size - 1) // window_size + 1)

    def steps_of(self, window: int, global_batch_size: int) -> range:
        """The steps that take samples from a window: after the last one its blocks can be dropped.

        Empty where all of a lane's last, short window belongs to the incomplete last batch.

        Raises:
            ValueError: window is out of range, or as `num_batches`.
        """
        first, stop = self._blocks_in(window)
        size, num_batches = self._slice_size(global_batch_size), self.num_batches(global_batch_size)
        return range(
            min(first * self.block_samples // size, num_batches),
            min((stop * self.block_samples - 1) // size + 1, num_batches),
        )

    def blocks(self, lane: int, window: int) -> np.ndarray:
        """Return the blocks that a window of a lane reads, ascending: int64 [window_blocks], fewer in the last window.

        Raises:
            ValueError: lane or window is out of range.
        """
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lane must be in [0, {self.num_lanes}), got {lane}")
        return np.sort(self._dealt(range(lane, lane + 1), window)[0])

    def block_ranges(self, lane: int, window: int) -> np.ndarray:
        """Return the samples of each of `blocks`: int64 [num, 2], the first one and the one after the last."""
        return self.sample_ranges(self.blocks(lane, window))

    def sample_ranges(self, blocks: np.ndarray) -> np.ndarray:
        """Return the samples of some blocks: int64 [num, 2], the first one and the one after the last."""
        first = np.asarray(blocks, np.int64) * self.block_samples
        stop = np.where(blocks == self.num_blocks - 1, self.num_samples, first + self.block_samples)
        return np.stack([first, stop], axis=-1)

    def block_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the block of each sample, int64, shape of the samples."""
        return np.minimum(np.asarray(samples, np.int64) // self.block_samples, self.num_blocks - 1)

    def _slice_size(self, global_batch_size: int) -> int:
        if global_batch_size < 1 or global_batch_size % self.num_lanes:
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of the number of lanes {self.num_lanes}"
            )
        return global_batch_size // self.num_lanes

    def _blocks_in(self, window: int) -> tuple[int, int]:
        """First and end of a window among a lane's blocks."""
        if not 0 <= window < self.num_windows:
            raise ValueError(f"window must be in [0, {self.num_windows}), got {window}")
        first = window * self.window_blocks
        return first, min(first + self.window_blocks, self.blocks_per_lane)

    def _dealt(self, lanes: range, window: int) -> np.ndarray:
        """The blocks of a window as they were dealt, int64 [lanes, blocks]."""
        turns = np.arange(*self._blocks_in(window)) * self.num_lanes + np.arange(lanes.start, lanes.stop)[:, None]
        return sample_at(turns, self.num_blocks, self.seed, self.epoch, _BLOCK_STREAM)

    def window_samples(self, lanes: range, window: int, start: int, stop: int) -> np.ndarray:
        """The samples at places start..stop-1 of a window, int64 [lanes, stop - start]; fewer at its end."""
        first_block, end_block = self._blocks_in(window)
        num = (end_block - first_block) * self.block_samples
        table = self._table(lanes, window, num)
        if num < SMALL:
            return table[:, start:stop]
        places = np.tile(np.arange(start, min(stop, num)), (len(lanes), 1))
        return self._located(
            table, sample_at(places, num, self.seed, self.epoch, self._streams(lanes, window)[:, None])
        )

    def _table(self, lanes: range, window: int, num: int) -> np.ndarray:
        """What is kept of a window of num samples: its samples, int64 [lanes, num]; of a large window, `_dealt`."""
        key = (window, lanes.start, lanes.stop)
        table = self._tables.get(key)
        if table is None:
            table = self._dealt(lanes, window)
            if num < SMALL:
                table = self._located(table, small_orders(num, self.seed, self.epoch, self._streams(lanes, window)))
            for old in list(self._tables)[: 1 - _NUM_TABLES]:
                self._tables.pop(old, None)  # another thread may have removed it
            self._tables[key] = table
        return table

    def _streams(self, lanes: range, window: int) -> np.ndarray:
        return 1 + window * self.num_lanes + np.arange(lanes.start, lanes.stop)

    def _located(self, dealt: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The samples of places in a window's blocks, int64 [lanes, n]."""
        turn, within = np.divmod(order, self.block_samples)
        blocks = np.take_along_axis(dealt, turn, axis=1)
        num_last = self.block_samples + self.num_samples % self.block_samples
        if num_last > self.block_samples:
            is_last = blocks == self.num_blocks - 1
            if is_last.any():
                within[is_last] = sample_at(within[is_last], num_last, self.seed, self.epoch, _LAST_BLOCK_STREAM)
        return blocks * self.block_samples + within
