"""Several data sets as one, in a mixture that is exact by position."""

# S sources, N samples, C lanes, G global batch, W world size

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.beton import BetonReader
from pipelines.epoch_order import Group
from pipelines.errors import DataError
from pipelines.order.keyed import sample_at
from pipelines.order.mixture import Mixture
from pipelines.samples import Samples, joined
from pipelines.shards.lane_reader import LanesOrder, LaneStream, check_lanes, step_groups
from pipelines.shards.sharded_images import ShardedImages

_MAX_SEED = (1 << 64) - 1
_FILE_STREAM = (1 << 32) - 4  # of keyed orders, not one of `order.lanes`


class MixedImages:
    """`samples.ImageSet` of several data sets: the ids of one follow those of the one before.

    Attributes:
        sources: The data sets.
        mixture: Which of them a place has.
        path: Their names, for messages.
        num_samples: N of all sources.
        starts: int64 [S + 1], the first id of each source; the last is N.
        identity: Of all sources and weights.
        stored_modes: The modes that occur.
        class_names: Names by label, if all sources have the same; otherwise no image has a label here.
        hashes: None; images are not compared across sources.
    """

    hashes: np.ndarray | None = None

    def __init__(self, sources: Sequence[BetonReader | ShardedImages], weights: Sequence[float]) -> None:
        """Raises DataError where the weights are of no use."""
        self.sources = list(sources)
        try:
            self.mixture = Mixture(weights)
        except ValueError as error:
            raise DataError(f"data.train: {error}") from None
        self.path: Path | str = " + ".join(str(source.path) for source in self.sources)
        self.starts = np.cumsum([0, *(source.num_samples for source in self.sources)])
        self.num_samples = int(self.starts[-1])
        self.stored_modes = tuple(sorted({mode for source in self.sources for mode in source.stored_modes}))
        names = [source.class_names for source in self.sources]
        self.has_labels = all(each is not None and each == names[0] for each in names)
        self.class_names = names[0] if self.has_labels else None

    def replacing(self, bad_samples: BadSamples) -> MixedImages:
        """See `ShardedImages.replacing`."""
        found = copy.copy(self)
        found.sources = [
            source.replacing(_OfSource(bad_samples, self, number)) if isinstance(source, ShardedImages) else source
            for number, source in enumerate(self.sources)
        ]
        return found

    @property
    def identity(self) -> list[int]:
        """See `ImageSet.identity`."""
        identities = [source.identity for source in self.sources]
        crcs = [zlib.crc32(repr(value).encode()) for value in (identities, self.mixture.counts.tolist())]
        return [self.num_samples, sum(each[1] for each in identities), *crcs]

    @property
    def sizes(self) -> np.ndarray:
        """See `ImageSet.sizes`."""
        return np.concatenate([source.sizes for source in self.sources])

    @property
    def labels(self) -> np.ndarray:
        """See `ImageSet.labels`."""
        if not self.has_labels:
            return np.full(self.num_samples, -1)
        return np.concatenate([source.labels for source in self.sources])

    @property
    def remote_sources(self) -> list[ShardedImages]:
        """The sources that are fetched."""
        return [source for source in self.sources if isinstance(source, ShardedImages) and source.is_remote]

    @property
    def is_remote(self) -> bool:
        """Whether any of it is fetched."""
        return bool(self.remote_sources)

    @property
    def retries(self) -> dict[str, int]:
        """How often a remote request was repeated, by reason."""
        return dict(sum((Counter(source.retries) for source in self.remote_sources), Counter()))

    def samples(self, ids: np.ndarray) -> Samples:
        """See `ImageSet.samples`."""
        ids = np.asarray(ids, np.int64)
        source_of = np.searchsorted(self.starts, ids, side="right") - 1
        parts = []
        for number in np.unique(source_of).tolist():
            positions = np.flatnonzero(source_of == number)
            own = self.sources[number].samples(ids[positions] - self.starts[number])
            parts.append((positions, self.as_own(number, own)))
        return joined(parts)

    def as_own(self, number: int, samples: Samples) -> Samples:
        """Samples of one source, with the ids and labels that they have here."""
        labels = samples.labels if self.has_labels else np.full(len(samples), -1)
        return replace(samples, ids=samples.ids + self.starts[number], labels=labels)

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """See `ImageSet.check_unchanged`."""
        source_of = None if ids is None else np.searchsorted(self.starts, ids, side="right") - 1
        for number, source in enumerate(self.sources):
            if ids is None or source_of is None:
                source.check_unchanged()
            elif len(own := ids[source_of == number]):
                source.check_unchanged(own - self.starts[number])


class MixedOrder:
    """`epoch_order.EpochOrder` of a mixture: which source a position of a lane has is fixed; each goes its own epochs.

    A source with a large weight begins its next epoch while another is still in its first. The views of a sample are
    those of its own source's epoch, so that a sample that comes twice in an epoch of the run has other views.
    """

    def __init__(
        self,
        images: MixedImages,
        *,
        global_batch_size: int,
        num_lanes: int,
        window_bytes: int,
        seed: int,
        drop_behind: bool = False,
    ) -> None:
        """See `LanesOrder`; the window is divided among the sources by their weights.

        Raises:
            DataError: the numbers do not fit each other, or a source is too small.
        """
        check_lanes(num_lanes, global_batch_size)
        self.images, self.num_lanes, self.seed = images, num_lanes, seed
        self.slice_size = global_batch_size // num_lanes
        self.num_batches = images.num_samples // global_batch_size
        shares = images.mixture.counts / images.mixture.period
        self.orders: list[LanesOrder | None] = []
        for number, (source, share) in enumerate(zip(images.sources, shares.tolist(), strict=True)):
            if source.num_samples < num_lanes:
                raise DataError(
                    f"{source.path}: {source.num_samples} images are too few for {num_lanes} lanes: lower data.lanes"
                )
            self.orders.append(
                LanesOrder(
                    source,
                    global_batch_size=num_lanes,  # its lanes are read one sample at a time
                    num_lanes=num_lanes,
                    window_bytes=max(1, round(window_bytes * share)),
                    seed=seed + number & _MAX_SEED,
                    drop_behind=drop_behind,
                )
                if isinstance(source, ShardedImages)
                else None
            )

    def epoch(self, epoch: int, first_batch: int, rank: int, world_size: int) -> MixedEpoch:
        """See `EpochOrder.epoch`."""
        return MixedEpoch(self, epoch, first_batch, rank, world_size)


class _OfSource(BadSamples):
    """The bad samples of one source, recorded among those of all."""

    def __init__(self, bad_samples: BadSamples, images: MixedImages, number: int) -> None:
        self._all, self._first = bad_samples, int(images.starts[number])
        self._num = images.sources[number].num_samples

    def replace(self, sample_id: int, reason: str) -> int:
        """See `BadSamples.replace`; the replacement is of the same source where there is one after it."""
        found = self._all.replace(self._first + sample_id, reason) - self._first
        return found if 0 <= found < self._num else 0


class MixedEpoch:
    """`epoch_order.EpochSamples` of one rank."""

    def __init__(self, order: MixedOrder, epoch: int, first_batch: int, rank: int, world_size: int) -> None:
        self._order, self._images = order, order.images
        self._first_batch = first_batch
        self._first_place = epoch * order.num_batches * order.slice_size  # in a lane, over the whole run
        num = order.num_lanes // world_size
        self._lanes = range(rank * num, (rank + 1) * num)
        # Each lane begins elsewhere in the pattern: a batch has the mixture however few samples a lane gives it.
        lanes = np.arange(self._lanes.start, self._lanes.stop)[:, None]
        self._offsets = lanes * order.images.mixture.period // order.num_lanes
        self._streams: list[LaneStream | None] = [
            each and each.stream(rank, world_size, goes_on=True) for each in order.orders
        ]

    def groups(self) -> Iterator[Group]:
        """See `EpochSamples.groups`."""
        size, num_lanes, mixture = self._order.slice_size, len(self._lanes), self._images.mixture
        for steps in step_groups(self._first_batch, self._order.num_batches, size * num_lanes):
            places = self._places(steps.start) + np.arange(len(steps) * size)
            source_of, number_of = mixture.source_of(places), self._num_before(places)
            # Where a lane's places go: one batch after the other, the lanes side by side in each.
            position = np.arange(places.size).reshape(len(steps), num_lanes, size).swapaxes(0, 1).reshape(places.shape)
            epochs, parts = np.empty(places.size, np.int64), []
            for source in np.unique(source_of).tolist():
                lanes, columns = np.nonzero(source_of == source)
                own_epochs, own_places = np.divmod(number_of[lanes, columns, source], self._per_lane(source))
                for own_epoch in np.unique(own_epochs).tolist():
                    some = own_epochs == own_epoch
                    at = position[lanes[some], columns[some]]
                    epochs[at] = own_epoch
                    parts.append((at, self._take(source, own_epoch, lanes[some], own_places[some])))
            yield Group(joined(parts), epochs)

    def end(self, num_batches: int) -> None:
        """See `EpochSamples.end`."""
        num_used = self._num_before(self._places(self._first_batch + num_batches)).min(axis=(0, 1))
        for stream, num in zip(self._streams, num_used.tolist(), strict=True):
            if stream is not None:
                stream.end(*divmod(num, stream.places_per_lane))

    def close(self) -> None:
        """See `EpochSamples.close`."""
        for stream in self._streams:
            if stream is not None:
                stream.close()

    def _places(self, step: int) -> np.ndarray:
        """Where each lane is in the mixture's pattern before a step, int64 [lanes, 1], over the whole run."""
        return self._offsets + self._first_place + step * self._order.slice_size

    def _num_before(self, places: np.ndarray) -> np.ndarray:
        """How many samples of each source a lane had before these places: int64 [lanes, n, S]."""
        return self._images.mixture.num_before(places) - self._images.mixture.num_before(self._offsets)

    def _per_lane(self, source: int) -> int:
        """A source's samples in a lane in its own epoch."""
        stream = self._streams[source]
        num = self._images.sources[source].num_samples
        return stream.places_per_lane if stream else num // self._order.num_lanes

    def _take(self, number: int, own_epoch: int, lanes: np.ndarray, places: np.ndarray) -> Samples:
        """A source's samples at some places of lanes, which are counted from the rank's first."""
        stream, source = self._streams[number], self._images.sources[number]
        if stream is not None:
            span = range(int(places.min()), int(places.max()) + 1)
            ids = stream.ids(own_epoch, span)[lanes, places - span.start]
            return self._images.as_own(number, stream.samples(own_epoch, span, ids))
        positions = places * self._order.num_lanes + self._lanes.start + lanes
        ids = sample_at(positions, source.num_samples, self._order.seed + number & _MAX_SEED, own_epoch, _FILE_STREAM)
        return self._images.as_own(number, source.samples(ids))
