"""Data loaders: sampler -> engine -> pixel op -> device, one batch after the other."""

# N samples, G global batch, B local batch, W world size, V views

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.beton import BetonReader, Identity
from pipelines.beton.bus_error import report_bus_errors
from pipelines.config_field import Section, setting
from pipelines.engines import BatchPlan, Engine, EngineName, build_engine
from pipelines.epoch_order import EpochOrder, FileOrder, Group, KeyedOrder
from pipelines.errors import DataError
from pipelines.path_names import why_no_path
from pipelines.pixel_op import PixelOpAndTransfer
from pipelines.read_ahead import read_whole
from pipelines.remote.store import why_not_to_write_down
from pipelines.samples import ImageSet
from pipelines.shards.expectation import describe_expectation, expect
from pipelines.shards.lane_reader import LanesOrder, check_ranks
from pipelines.shards.mixed_images import MixedImages, MixedOrder
from pipelines.shards.open_images import AnyImages, open_images
from pipelines.shards.sharded_images import ShardedImages
from pipelines.views import ViewsConfig, build_eval_spec, build_view_specs, draw, eval_params, size_groups

if TYPE_CHECKING:
    import torch

    from pipelines.batch import Batch, RawBatch

T = TypeVar("T")

_DEFAULT_LANES = 64  # shared by up to 64 processes; a rank has whole lanes
_READING_ENGINES = ("ffcv", "dali", "torch")  # engines that read from the file during iteration


@dataclass(frozen=True, kw_only=True)
class WeightedImages(Section):
    """One of several data sets to train on.

    Attributes:
        path: As data.train.
        weight: Its share of the samples, relative to the others' weights; not of its number of images.
    """

    path: str
    weight: float = setting(1.0, "(0, 1e9]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if reason := why_no_path(self.path) or why_not_to_write_down(self.path):
            raise ValueError(f"path: {reason}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The source of the images and how they are read.

    Attributes:
        train: What to train on: a .beton file, or a data set of many (`fastssl manifest`): its folder, the
            `dataset.json` in it, a pattern such as "shards/*.beton", or a URL. Or several of these, each with a weight
            (`WeightedImages`): an epoch has as many samples as all have images, mixed by the weights.
        test: The .beton file to evaluate on; None: a hold-out of the training file.
        engine: The engine that decodes, crops and resizes.
        global_batch_size: Number of images per step, over all processes.
        num_workers: Decoding threads per process; 0: the available cores, divided by the processes of the node.
        prefetch_batches: Number of batches prepared ahead.
        holdout_fraction: Fraction of the training images that the probes are not fitted on.
        order: "auto": "lanes" for a data set of many files, "random" for one. "random": a random permutation of all
            samples. "quasi_random": for slow disks and files larger than memory. Pieces of 4 MiB from random places of
            the file form a window; samples are shuffled within a window, and one window follows another. Each piece is
            read whole and once per epoch. If the file is sorted by class, a window should contain many pieces.
            "lanes": the same for many files, local or remote, and any number of images (`pipelines.order.lanes`). The
            order does not depend on the number of processes, and no two of them read the same piece. An epoch leaves
            out a few images, others in each epoch.
        lanes: Number of lanes. It divides the global batch, and the number of processes divides it. 0: the largest
            number that divides both the global batch and 64.
        window_mb: Size of the stored images in a window of quasi-random order, or of all lanes, in MB; up to two
            windows are in memory at a time.
        cache_dir: Folder on each node's own disk where pieces of remote files are kept; its processes share it. None:
            nothing is kept, and each epoch fetches what it needs.
        cache_gb: Largest size of what is kept there, in GB.
        cache: How the page cache is used. "os": the file's bytes stay in it as long as there is room. "ram": the file
            is loaded into it before the first batch and must fit. "none": bytes are dropped after use.
        max_bad_fraction: Fraction of the training images that may be damaged. Each damaged image is replaced by
            another and reported; exceeding the fraction ends the run.
    """

    train: str | tuple[WeightedImages, ...] = ""
    test: str | None = None
    engine: EngineName = "ffcv"
    global_batch_size: int = setting(256, "[1, 1e6]")
    num_workers: int = setting(0, "[0, 1024]", free=True)
    prefetch_batches: int = setting(3, "[1, 256]", free=True)
    holdout_fraction: float = setting(0.1, "[0, 1)")
    order: Literal["auto", "random", "quasi_random", "lanes"] = "auto"
    lanes: int = setting(0, "[0, 65536]")
    window_mb: int = setting(1024, "[1, 1e6]")
    cache: Literal["os", "ram", "none"] = setting("os", free=True)
    cache_dir: str | None = setting(None, free=True)
    cache_gb: float = setting(100.0, "[0.001, 1e6]", free=True)
    max_bad_fraction: float = setting(0.001, "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "test", "cache_dir"):
            value = getattr(self, name) or ""
            if isinstance(value, str) and (reason := why_no_path(value) or why_not_to_write_down(value)):
                raise ValueError(f"{name}: {reason}")

    @property
    def train_paths(self) -> tuple[str, ...]:
        """What data.train names, without weights; empty if it is not set."""
        if isinstance(self.train, str):
            return (self.train,) if self.train else ()
        return tuple(each.path for each in self.train)

    @property
    def train_name(self) -> str:
        """data.train as a text."""
        return " + ".join(self.train_paths)


class Loader:
    """Yields the training batches of one rank; build it with `build_loader`.

    Attributes:
        num_samples: Number of images of the data set.
        identity: Its identity at the start, which must be the same in a resumed run.
        bad_samples: The damaged samples found so far.
        order: The order of an epoch.
    """

    def __init__(
        self,
        engine: Engine,
        views: ViewsConfig,
        *,
        images: ImageSet,
        order: EpochOrder,
        cfg: DataConfig,
        bad_samples: BadSamples,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self.num_samples = images.num_samples
        self.identity: Identity = images.identity
        self.bad_samples = bad_samples
        self._engine = engine
        self._images, self.order = images, order
        self._is_reading = cfg.engine in _READING_ENGINES
        self._local_batch_size = cfg.global_batch_size // world_size
        self._specs = build_view_specs(views)
        self._groups = size_groups(self._specs)
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._pixel_op = PixelOpAndTransfer(self._groups, views, device, num_threads)

    @property
    def view_shapes(self) -> list[tuple[int, int, int]]:
        """[3, S, S] of each view."""
        return [(3, spec.size_px, spec.size_px) for spec in self._specs]

    @property
    def bad_sample_ids(self) -> list[int]:
        """The damaged images that this rank has found so far."""
        return list(self.bad_samples.reasons)

    @property
    def remote_retries(self) -> dict[str, int] | None:
        """How often requests were repeated so far, by reason; None: nothing is fetched."""
        images = self._images
        if isinstance(images, MixedImages):
            return images.retries if images.remote_sources else None
        return images.retries if isinstance(images, ShardedImages) and images.is_remote else None

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return self.order.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Generator[Batch, None, None]:
        """Yield the batches of one epoch, which depend only on (seed, epoch, rank, world size).

        Args:
            epoch: >= 0.
            first_batch: Index of the batch to start with; the batches are the same as in an uninterrupted epoch.
        Raises:
            ValueError: first_batch is out of range.
            DataError: more samples cannot be decoded than data.max_bad_fraction allows.
            DataChangedError: the file was changed in place. No batch yielded before has data of the changed file.
        """
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch must be in [0, {len(self)}], got {first_batch}")
        return self._iterate(epoch, first_batch)

    def close(self) -> None:
        """Stop the engine's threads."""
        self._engine.close()

    def _iterate(self, epoch: int, first_batch: int) -> Generator[Batch, None, None]:
        size = self._local_batch_size
        samples = self.order.epoch(epoch, first_batch, self._rank, self._world_size)
        plans = self.plans(samples.groups())
        if self._is_reading:
            plans = _while_unchanged(self._images, plans, _ids_of_plan)
        # Reading ahead is ended first: the engine may wait for it.
        with closing(self._engine.batches(plans, size, self._groups)) as raw_batches, closing(samples):
            checked = raw_batches
            if self._is_reading:
                checked = _while_unchanged(self._images, raw_batches, _ids_of_batch)
            for num_done, batch in enumerate(self._pixel_op.each(checked), 1):
                samples.end(num_done)
                yield batch

    def plans(self, groups: Iterable[Group]) -> Iterator[BatchPlan]:
        """Plan the batches of `EpochSamples.groups`."""
        size = self._local_batch_size
        for samples, epoch in groups:
            params = draw(self._specs, self._seed, epoch, samples.ids, samples.sizes)
            for first in range(0, len(samples), size):
                rows = slice(first, first + size)
                yield BatchPlan(samples[rows], params[rows])


class EvalLoader:
    """Yields the samples in order, once per iteration, each as one deterministic view; see `build_eval_loader`."""

    def __init__(
        self,
        engine: Engine,
        views: ViewsConfig,
        *,
        images: ImageSet,
        sample_ids: np.ndarray,
        local_batch_size: int,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._engine, self._images = engine, images
        self._sample_ids = sample_ids
        self._local_batch_size = local_batch_size
        self._spec = build_eval_spec(views)
        self._groups = size_groups([self._spec])
        self._pixel_op = PixelOpAndTransfer(self._groups, views, device, num_threads)

    def __len__(self) -> int:
        """Number of batches, including a smaller last one."""
        return -(-len(self._sample_ids) // self._local_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self._engine.batches(self._plans(), self._local_batch_size, self._groups)) as raw_batches:
            yield from self._pixel_op.each(_while_unchanged(self._images, raw_batches, _ids_of_batch))

    def close(self) -> None:
        """Stop the engine's threads."""
        self._engine.close()

    def _plans(self) -> Iterator[BatchPlan]:
        for first in range(0, len(self._sample_ids), self._local_batch_size):
            samples = self._images.samples(self._sample_ids[first : first + self._local_batch_size])
            yield BatchPlan(samples, eval_params(self._spec, samples.sizes))


def _while_unchanged(images: ImageSet, items: Iterator[T], ids_of: Callable[[T], np.ndarray]) -> Iterator[T]:
    """Pass on plans of batches, or batches of an engine, as long as their files have not changed.

    Raises:
        DataChangedError: one was changed in place, which may also look like damaged images.
    """
    try:
        for item in items:
            images.check_unchanged(ids_of(item))
            yield item
    except DataError:
        images.check_unchanged()
        raise


def _ids_of_plan(plan: BatchPlan) -> np.ndarray:
    return plan.samples.ids


def _ids_of_batch(batch: RawBatch) -> np.ndarray:
    return batch.sample_ids


def open_train_images(cfg: DataConfig) -> AnyImages:
    """Open what `data.train` names.

    Raises:
        DataError: it is not set, or is neither a .beton file nor a data set of many.
    """
    if not cfg.train:
        raise DataError("data.train is not set: give a .beton file (`fastssl convert` writes one)")
    if not isinstance(cfg.train, str):
        sources = [_open_source(cfg, each.path) for each in cfg.train]
        return MixedImages(sources, [each.weight for each in cfg.train])
    return _open_source(cfg, cfg.train)


def _open_source(cfg: DataConfig, place: str) -> BetonReader | ShardedImages:
    cache_bytes = round(cfg.cache_gb * 1e9)
    images = open_images(place, cache_dir=cfg.cache_dir, cache_bytes=cache_bytes)
    if isinstance(images, ShardedImages) and images.is_remote and cfg.cache_dir is not None:
        window_bytes = cfg.window_mb * 1_000_000
        if cache_bytes < 2 * window_bytes and cache_bytes < images.manifest.image_bytes:
            raise DataError(
                f"data.cache_gb={cfg.cache_gb:g} is less than two windows of data.window_mb={cfg.window_mb}: raise it, "
                "or leave data.cache_dir out"
            )
    return images


def build_loader(
    images: AnyImages,
    cfg: DataConfig,
    views: ViewsConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
    num_threads: int,
) -> Loader:
    """Build the training loader of one rank.

    Args:
        images: The open training data.
        cfg: The data section.
        views: The views section.
        seed: The run's seed.
        rank: In [0, world_size).
        world_size: W.
        device: The device of the batches.
        num_threads: CPU threads of the pixel op, >= 1.
    Raises:
        ValueError: rank is out of range.
        DataError: the global batch is larger than the data set or not divisible by W, or the file is to be loaded
            into memory and does not fit.
    """
    size = cfg.global_batch_size
    if size > images.num_samples:
        raise DataError(
            f"data.global_batch_size is {size}, but {images.path} holds {images.num_samples} images: lower it"
        )
    if size % world_size:
        raise DataError(f"data.global_batch_size is {size}, not a multiple of the {world_size} processes: change it")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    num_workers = cfg.num_workers or cores_per_process()
    bad_samples = BadSamples(images.path, images.num_samples, cfg.max_bad_fraction)
    if isinstance(images, ShardedImages | MixedImages):
        images = images.replacing(bad_samples)
    order = build_order(images, cfg, seed)
    if isinstance(order, LanesOrder | MixedOrder):
        check_ranks(order.num_lanes, world_size)
    if isinstance(images, BetonReader) and cfg.cache == "ram" and cfg.engine in _READING_ENGINES:
        read_whole(images, int(os.environ.get("LOCAL_RANK", "0")), _local_world_size())
    _report_bus_errors(images)
    engine = build_engine(
        cfg.engine,
        images,
        num_workers=num_workers,
        prefetch_batches=cfg.prefetch_batches,
        device=device,
        bad_samples=bad_samples,
    )
    images.check_unchanged()  # engines that keep the images in memory have read them now
    return Loader(
        engine,
        views,
        images=images,
        order=order,
        cfg=cfg,
        bad_samples=bad_samples,
        seed=seed,
        rank=rank,
        world_size=world_size,
        device=device,
        num_threads=num_threads,
    )


def remote_line(images: AnyImages, cfg: DataConfig, loader: Loader, world_size: int) -> str | None:
    """What a training on remote shards will fetch, as one line; None: nothing."""
    if not isinstance(images, ShardedImages | MixedImages) or not images.is_remote:
        return None
    num_nodes = max(1, world_size // _local_world_size())
    found = expect(images, loader.order, global_batch_size=cfg.global_batch_size, num_nodes=num_nodes)
    return describe_expectation(found, round(cfg.cache_gb * 1e9) if cfg.cache_dir else None)


def build_order(images: AnyImages, cfg: DataConfig, seed: int) -> FileOrder | LanesOrder | KeyedOrder | MixedOrder:
    """The order that `data.order` names.

    Raises:
        DataError: it is not one for these images.
    """
    size, window_bytes = cfg.global_batch_size, cfg.window_mb * 1_000_000
    is_reading, drop_behind = cfg.engine in _READING_ENGINES, cfg.cache == "none"
    if isinstance(images, BetonReader):
        if cfg.order == "lanes":
            raise DataError(f"data.order=lanes: {images.path} is one file: take random or quasi_random")
        return FileOrder(
            images,
            global_batch_size=size,
            seed=seed,
            window_bytes=window_bytes if cfg.order == "quasi_random" else None,
            drop_behind=drop_behind,
            reads_ahead=is_reading,
        )
    if cfg.cache == "ram":
        raise DataError("data.cache=ram is for one file: leave it out; the system keeps what fits into memory")
    lanes: dict[str, Any] = {
        "global_batch_size": size,
        "num_lanes": cfg.lanes or math.gcd(size, _DEFAULT_LANES),
        "window_bytes": window_bytes,
        "seed": seed,
        "drop_behind": drop_behind,
    }
    if isinstance(images, MixedImages):
        if cfg.order not in ("auto", "lanes"):
            raise DataError(f"data.order={cfg.order}: several data sets are mixed in lanes: leave it out")
        return MixedOrder(images, **lanes)
    if cfg.order == "quasi_random":
        raise DataError(f"data.order=quasi_random: {images.path} is a data set of many files: take lanes")
    if cfg.order == "random":
        num_bytes = images.manifest.image_bytes
        if images.is_remote and (cfg.cache_dir is None or cfg.cache_gb * 1e9 < num_bytes):
            raise DataError(
                f"data.order=random: {images.path} is remote and {num_bytes / 1e9:.3g} GB large: take lanes, or a "
                "data.cache_dir with a data.cache_gb that holds all of it"
            )
        return KeyedOrder(images, global_batch_size=size, seed=seed, read=images.few)
    return LanesOrder(images, **lanes)


def _report_bus_errors(images: AnyImages) -> None:
    """Of files that are open; those of shards are reported as they are opened."""
    for source in images.sources if isinstance(images, MixedImages) else (images,):
        if isinstance(source, BetonReader):
            report_bus_errors(source)


def build_eval_loader(
    images: AnyImages,
    views: ViewsConfig,
    *,
    local_batch_size: int,
    engine: str,
    device: torch.device,
    sample_ids: np.ndarray | None = None,
    num_workers: int = 0,
) -> EvalLoader:
    """Build a loader of the eval views.

    Args:
        images: The open data.
        views: The views section.
        local_batch_size: B, >= 1.
        engine: Name of the engine.
        device: The device of the batches.
        sample_ids: The samples to load, int64 [num]; None: all.
        num_workers: Decoding threads; 0: the available cores, divided by the processes of the node.
    Raises:
        ValueError: B < 1, or a sample id out of range.
    """
    ids = np.arange(images.num_samples) if sample_ids is None else np.asarray(sample_ids, np.int64)
    if local_batch_size < 1:
        raise ValueError(f"local_batch_size must be >= 1, got {local_batch_size}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < images.num_samples:
        raise ValueError(f"sample_ids must be in [0, {images.num_samples}), got {ids.min()}..{ids.max()}")
    num_threads = num_workers or cores_per_process()
    _report_bus_errors(images)
    return EvalLoader(
        build_engine(engine, images, num_workers=num_threads, prefetch_batches=2, device=device),
        views,
        images=images,
        sample_ids=ids,
        local_batch_size=local_batch_size,
        device=device,
        num_threads=num_threads,
    )


def cores_per_process() -> int:
    """Number of cores available to this process, divided by the processes of the node (see `_local_world_size`)."""
    return max(1, len(os.sched_getaffinity(0)) // _local_world_size())


def _local_world_size() -> int:
    """Number of processes on the node (from torchrun's and DeepSpeed's environment variables)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
