"""A data set of many shards as one: random access by id, and what is known of all images from the manifest alone."""

# N samples, n of a call, S shards

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.errors import DataError
from pipelines.remote.cache import BlockCache
from pipelines.remote.store import RemoteError, RemoteStore, is_url
from pipelines.samples import Samples
from pipelines.shards.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from pipelines.shards.pieces import LocalFiles, Piece, RemoteFiles
from pipelines.shards.rows import ROW, modes_of, num_bytes_of
from pipelines.shards.store import LocalStore

MAX_LISTED = 1 << 26  # samples whose sizes and labels may be held in memory at once, for evaluation
BLOCK_BYTES = 4 << 20  # of images: large enough that a disk or a network spends its time with transfer
_MAX_KEPT_ROWS = 1 << 22  # of local shards: 100 MB in each process
_MIN_BLOCKS_OF_LANE = 32
_KEPT_BYTES = 256 << 20  # of remote images for random access


class ShardedImages:
    """`samples.ImageSet` of a manifest; nothing here is as long as the data set, but what says so.

    Attributes:
        path: The manifest's folder, or its URL without anything secret.
        manifest: Which shards there are.
        files: Their contents.
        is_remote: Whether they are fetched.
        num_samples: N.
        identity: See `Manifest.identity`.
        stored_modes: The modes that occur.
        class_names: Names by label; None if unknown.
        hashes: None; images are not compared across shards.
        bad_samples: Chooses what takes the place of a damaged remote image; None: such an image is an error.
    """

    hashes: np.ndarray | None = None

    def __init__(self, place: str, manifest: Manifest, files: LocalFiles | RemoteFiles) -> None:
        self.path: Path | str = place
        self.manifest, self.files = manifest, files
        self.is_remote = isinstance(files, RemoteFiles)
        self.num_samples, self.identity = manifest.num_images, manifest.identity
        self.stored_modes, self.class_names = manifest.modes, manifest.class_names
        self._kept = _KeptBlocks()
        self.bad_samples: BadSamples | None = None

    def replacing(self, bad_samples: BadSamples) -> ShardedImages:
        """The same data set, in which another image takes the place of a remote one with a wrong checksum.

        Args:
            bad_samples: Records the damaged images and chooses their replacements.
        """
        found = copy.copy(self)
        found.bad_samples = bad_samples
        return found

    @property
    def retries(self) -> dict[str, int]:
        """How often a remote request was repeated, by reason."""
        return dict(self.files.store.retries) if isinstance(self.files, RemoteFiles) else {}

    @property
    def block_samples(self) -> int:
        """K for random access: as many samples as have about `BLOCK_BYTES` on average."""
        return max(1, round(BLOCK_BYTES * self.num_samples / max(self.manifest.image_bytes, 1)))

    def block_samples_of(self, num_lanes: int) -> int:
        """K for lanes: fewer where the data set is so small that an epoch would leave out much of it."""
        return max(1, min(self.block_samples, self.num_samples // (num_lanes * _MIN_BLOCKS_OF_LANE)))

    @property
    def num_labelled_classes(self) -> int:
        """Number of labels that occur."""
        return int(np.count_nonzero(self.manifest.label_counts))

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], -1 = no label; for evaluation, which holds features of all images as well.

        Raises:
            DataError: too many images for that.
        """
        return self._all_labels

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], (height, width) in pixels; as `labels`."""
        return self._all_sizes

    def samples(self, ids: np.ndarray) -> Samples:
        """See `ImageSet.samples`; the ids are those of the images that took the place of damaged ones.

        Raises:
            DataError: a shard cannot be read, or a remote image has a wrong checksum and is not replaced.
        """
        ids = np.array(ids, np.int64)
        rows, addresses = np.empty(len(ids), ROW), np.empty(len(ids), np.uint64)
        owners: list[object] = []
        if isinstance(self.files, LocalFiles):
            for shard, positions, local in self._by_shard(ids):
                maps = self.files.maps(shard)
                rows[positions] = maps.some_rows(local, keep=self.num_samples <= _MAX_KEPT_ROWS)
                addresses[positions] = rows["ptr"][positions] + maps.address
                owners.append(maps.mmap)
        else:
            self._fetch(ids, rows, addresses, owners)
        return to_samples(ids, rows, addresses, tuple(owners))

    def few(self, ids: np.ndarray) -> Samples:
        """As `samples`, but of remote images no more is fetched than these: two requests for each."""
        if not isinstance(self.files, RemoteFiles):
            return self.samples(ids)
        ids = np.array(ids, np.int64)
        rows, addresses = np.empty(len(ids), ROW), np.empty(len(ids), np.uint64)
        owners: list[object] = []
        for position, (i, piece) in enumerate(self.files.map(lambda i: self.read(i, i + 1)[0], ids.tolist())):
            if piece.damaged:
                ids[position], piece = self.substitute(i, piece.damaged[0])
            rows[position], addresses[position] = piece.rows[0], piece.addresses[0]
            owners.append(piece.owners)
        return to_samples(ids, rows, addresses, tuple(owners))

    def substitute(self, sample_id: int, reason: str) -> tuple[int, Piece]:
        """The image that takes the place of a damaged one: its id, and a piece of it alone.

        Raises:
            DataError: damaged images are not replaced, or too many are damaged.
        """
        while True:
            if self.bad_samples is None:
                raise DataError(f"{self.path}: image {sample_id} {reason}: copy its shard again")
            sample_id = self.bad_samples.replace(sample_id, reason)
            (piece,) = self.read(sample_id, sample_id + 1)
            if not piece.damaged:
                return sample_id, piece
            reason = piece.damaged[0]

    def few_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of some samples, ROW [n], a request for each if they are remote; their checksums are not compared."""
        ids = np.asarray(ids, np.int64)
        shards = np.searchsorted(self.manifest.starts, ids, side="right") - 1
        local = ids - self.manifest.starts[shards]
        found = self.files.map(
            lambda k: self.files.rows(int(shards[k]), int(local[k]), int(local[k]) + 1), range(len(ids))
        )
        return np.concatenate([np.empty(0, ROW), *(rows for _, rows in found)])

    def read(self, first: int, stop: int) -> list[Piece]:
        """Consecutive samples first..stop-1, one piece for each shard that they lie in."""
        return [self.files.read(shard, a, b) for shard, a, b in self.spans(first, stop)]

    def spans(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, stop) of consecutive samples, with their numbers in the shard."""
        starts = self.manifest.starts
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        while first < stop:
            end = min(stop, int(starts[shard + 1]))
            yield shard, first - int(starts[shard]), end - int(starts[shard])
            first, shard = end, shard + 1

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """See `ImageSet.check_unchanged`; remote ranges are asked for with the version of the object."""
        if isinstance(self.files, LocalFiles):
            shards = None if ids is None else np.unique(np.searchsorted(self.manifest.starts, ids, side="right") - 1)
            self.files.check_unchanged(None if shards is None else shards.tolist())

    def _by_shard(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Shard, positions in `ids`, and numbers in the shard."""
        shard_of = np.searchsorted(self.manifest.starts, ids, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        for positions in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            if len(positions):
                shard = int(shard_of[positions[0]])
                yield shard, positions, ids[positions] - self.manifest.starts[shard]

    def _fetch(self, ids: np.ndarray, rows: np.ndarray, addresses: np.ndarray, owners: list[object]) -> None:
        """Fetch the blocks of some ids, side by side, and fill in rows and addresses; puts replacements into `ids`."""
        assert isinstance(self.files, RemoteFiles)
        size, asked = self.block_samples, ids.copy()
        numbers = np.unique(ids // size).tolist()
        blocks = [(b * size, list(pieces)) for b, pieces in self.files.map(self._block, numbers)]
        for first, pieces in blocks:
            for piece in pieces:
                positions = np.flatnonzero((asked >= first) & (asked < first + len(piece.rows)))
                within = asked[positions] - first
                rows[positions], addresses[positions] = piece.rows[within], piece.addresses[within]
                owners.extend(piece.owners)
                is_damaged = np.isin(within, list(piece.damaged))
                for position, i in zip(positions[is_damaged].tolist(), within[is_damaged].tolist(), strict=True):
                    ids[position], other = self.substitute(first + i, piece.damaged[i])
                    rows[position], addresses[position] = other.rows[0], other.addresses[0]
                    owners.extend(other.owners)
                first += len(piece.rows)

    def _block(self, number: int) -> list[Piece]:
        """One block, kept for the next call: batches in order of ids share blocks."""
        if (found := self._kept.get(number)) is None:
            first = number * self.block_samples
            found = self.read(first, min(first + self.block_samples, self.num_samples))
            self._kept.put(number, found)
        return found

    @cached_property
    def _all_labels(self) -> np.ndarray:
        return self._all_rows["label"].astype(np.int64)

    @cached_property
    def _all_sizes(self) -> np.ndarray:
        return np.stack([self._all_rows["height"], self._all_rows["width"]], axis=1).astype(np.int32)

    @cached_property
    def _all_rows(self) -> np.ndarray:
        if self.num_samples > MAX_LISTED:
            raise DataError(
                f"{self.path}: {self.num_samples:,} images are too many to evaluate on all of them (at most "
                f"{MAX_LISTED:,}): name a smaller labelled data set, as data.test or by --on"
            )
        counts = [shard.num_images for shard in self.manifest.shards]
        parts = self.files.map(lambda shard: self.files.rows(shard, 0, counts[shard]), range(len(counts)))
        return np.concatenate([rows for _, rows in parts])


class _KeptBlocks:
    """The blocks of random access that were used last, at most `_KEPT_BYTES`. Thread-safe."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, list[Piece]] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, number: int) -> list[Piece] | None:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
            return self._blocks.get(number)

    def put(self, number: int, pieces: list[Piece]) -> None:
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = pieces
                self._num_bytes += _num_bytes(pieces)
            while self._num_bytes > _KEPT_BYTES and len(self._blocks) > 1:
                self._num_bytes -= _num_bytes(self._blocks.popitem(last=False)[1])


def to_samples(ids: np.ndarray, rows: np.ndarray, addresses: np.ndarray, owners: tuple[object, ...]) -> Samples:
    """Samples from their rows."""
    return Samples(
        ids=ids,
        addresses=addresses,
        num_bytes=num_bytes_of(rows),
        modes=modes_of(rows),
        sizes=np.stack([rows["height"], rows["width"]], axis=1).astype(np.int32),
        labels=rows["label"].astype(np.int64),
        owners=owners,
    )


def open_sharded(
    place: str, *, cache_dir: str | None = None, cache_bytes: int = 0, num_threads: int = 16
) -> ShardedImages:
    """Open the data set of a manifest.

    Args:
        place: The manifest, its folder, or its URL.
        cache_dir: For remote shards: folder on this node's disk for what was fetched; None: nothing is kept.
        cache_bytes: Most bytes in it.
        num_threads: Requests at a time.
    Raises:
        DataError: there is no manifest, it is damaged, or the store cannot be used.
    """
    if not is_url(place):
        path = Path(place)
        folder = path if path.is_dir() else path.parent
        text, _ = LocalStore(folder).get_whole(MANIFEST_NAME if path.is_dir() else path.name, MAX_MANIFEST_BYTES)
        manifest = Manifest.from_json(text, str(folder / MANIFEST_NAME if path.is_dir() else path))
        return ShardedImages(str(folder), manifest, LocalFiles(folder, manifest))
    prefix, _, name = place.rpartition("/")
    if not name.endswith(".json"):
        prefix, name = place.rstrip("/"), MANIFEST_NAME
    store = RemoteStore(prefix, num_threads=num_threads)
    try:
        manifest = _fetched(store, name)
    except RemoteError as error:
        raise DataError(f"{error} (`fastssl manifest URL` writes one)") from None
    except DataError:  # a wrong byte on the way, which its digest has found, does not come twice
        store.retries["wrong checksum"] += 1
        manifest = _fetched(store, name)
    cache = BlockCache(Path(cache_dir), cache_bytes) if cache_dir else None
    return ShardedImages(store.shown, manifest, RemoteFiles(store, manifest, cache))


def _fetched(store: RemoteStore, name: str) -> Manifest:
    return Manifest.from_json(store.get_whole(name, MAX_MANIFEST_BYTES)[0], f"{store.shown}/{name}")


def _num_bytes(pieces: list[Piece]) -> int:
    return sum(int(num_bytes_of(piece.rows).sum()) for piece in pieces)
