"""What is measured, as endless streams of batches: our loader with one of its engines, and bare decoding."""

# B batch

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.beton import JPG, BetonReader
from pipelines.engines import BatchPlan, Engine, Groups, build_engine
from pipelines.epoch_order import EpochOrder, FileOrder
from pipelines.samples import ImageSet, Samples
from pipelines.shards.open_images import open_images
from pipelines.shards.sharded_images import ShardedImages
from pipelines.views import ViewsConfig, build_view_specs, draw

if TYPE_CHECKING:
    from pipelines.batch import RawBatch
    from pipelines.loader import Loader

PREFETCH_BATCHES = 3
# A small data set is repeated within an epoch. Real epochs are long, and the measurement should not include a restart
# every few batches.
_MIN_EPOCH_IMAGES = 10_000
_ENGINES_WITHOUT_LOOK_AHEAD = ("torch", "synthetic")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be loaded."""

    beton: str  # the file
    views: ViewsConfig
    batch_size: int  # B
    num_threads: int  # cores to pin to, and threads or workers to use
    seed: int  # seed of the order and the draw
    device: str = "cpu"  # where the batches go


@dataclass(frozen=True)
class Stream:
    """An endless stream of batches of B images."""

    batches: Iterator[Any]
    num_ahead: int  # batches that may be ready before they are requested
    synchronise: Callable[[], object] = lambda: None  # returns when all batches yielded so far are complete


def open_engine(job: Job, *, engine: str) -> Stream:
    """Open this package's loader with the given engine.

    Raises:
        DataError: the engine does not support the file or the device.
    """
    import torch

    loader = build_job_loader(job, engine=engine)
    num_ahead = 0 if engine in _ENGINES_WITHOUT_LOOK_AHEAD else PREFETCH_BATCHES + 1
    if job.device == "cpu":
        return Stream(chained(loader.epoch), num_ahead)
    return Stream(chained(loader.epoch), num_ahead, torch.cuda.synchronize)


def build_job_loader(job: Job, *, engine: str) -> Loader:
    """Build the loader of a job as in training, except that the samples of one file are repeated.

    Raises:
        DataError: the engine does not support the file or the device.
    """
    import torch

    from pipelines.loader import DataConfig, Loader

    torch.set_num_threads(job.num_threads)
    opened, device = open_images(job.beton), torch.device(job.device)
    images, order = in_order(job, opened)
    bad_samples = BadSamples(opened.path, opened.num_samples, 0.0)
    ahead = {"num_workers": job.num_threads, "prefetch_batches": PREFETCH_BATCHES}
    inner = build_engine(engine, opened, **ahead, device=device, bad_samples=bad_samples)
    cfg = DataConfig(engine=engine, global_batch_size=job.batch_size, **ahead)  # pyright: ignore (a literal)
    return Loader(
        _RepeatedEngine(inner, opened.num_samples),
        job.views,
        images=images,
        order=order,
        cfg=cfg,
        bad_samples=bad_samples,
        seed=job.seed,
        rank=0,
        world_size=1,
        device=device,
        num_threads=job.num_threads,
    )


def in_order(job: Job, images: BetonReader | ShardedImages) -> tuple[ImageSet, EpochOrder]:
    """The images of a job in the order of a training: of one file repeated and random, of many in lanes.

    Raises:
        DataError: the batch does not fit the data set.
    """
    from pipelines.loader import DataConfig, build_order

    if isinstance(images, ShardedImages):
        cfg = DataConfig(global_batch_size=job.batch_size)
        return images, build_order(images, cfg, job.seed)
    repeated = RepeatedImages(images)
    order = FileOrder(
        repeated,
        global_batch_size=job.batch_size,
        seed=job.seed,
        window_bytes=None,
        drop_behind=False,
        reads_ahead=False,
    )
    return repeated, order


class _RepeatedEngine:
    """An engine that maps sample ids past the end of the file to repeated samples; it holds each image once."""

    def __init__(self, engine: Engine, num_samples: int) -> None:
        self._engine, self._num_samples = engine, num_samples

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        wrapped = (
            BatchPlan(replace(plan.samples, ids=plan.samples.ids % self._num_samples), plan.params) for plan in plans
        )
        return self._engine.batches(wrapped, local_batch_size, groups)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()


def open_decode(job: Job, *, seen_only: bool = False) -> Stream:
    """Open a stream of bare libjpeg-turbo decoding: each image is decoded once, nothing else.

    Args:
        job: The images.
        seen_only: Decode only what the views show, as the ffcv engine does; their draw is timed too.
    Raises:
        ValueError: the images are not stored as JPEG, or `seen_only` was not compiled.
    """
    from pipelines.convert import bounded_map
    from pipelines.engines.jpeg_region import why_no_region_decoder

    if seen_only and (reason := why_no_region_decoder()):
        raise ValueError(reason)
    images, order = in_order(job, open_images(job.beton))
    if images.stored_modes != (JPG,):
        raise ValueError("the images are not stored as JPEG")
    own, specs = threading.local(), build_view_specs(job.views)

    def decode(samples: Samples) -> None:
        if not hasattr(own, "decoder"):
            own.decoder = JpegSamples()
        boxes = draw(specs, job.seed, 0, samples.ids, samples.sizes)["crop_box"] if seen_only else None
        own.decoder.decode(samples, boxes)

    def batches_of(epoch: int) -> Iterator[Samples]:
        with closing(order.epoch(epoch, 0, 0, 1)) as samples:
            for group in samples.groups():
                for first in range(0, len(group.samples), job.batch_size):
                    yield group.samples[first : first + job.batch_size]

    num_ahead = 2 * job.num_threads
    batches = bounded_map(decode, chained(batches_of), ThreadPoolExecutor(job.num_threads), max_ahead=num_ahead)
    return Stream(batches, num_ahead)


class JpegSamples:
    """Decodes samples with libjpeg-turbo, one after the other, and discards the pixels."""

    def __init__(self) -> None:
        from pipelines.engines.turbojpeg import JpegDecoder

        self._decoder = JpegDecoder()

    def decode(self, samples: Samples, boxes: np.ndarray | None = None) -> None:
        """Decode samples that are JPEGs.

        Args:
            samples: B samples.
            boxes: Crop boxes (top, left, height, width), int32 [B, V, 4], of which only the union is decoded, if the
                ffcv engine would do so; None: decode the whole images.
        """
        from pipelines.engines.decode_crop import REGION_MIN_BYTES
        from pipelines.engines.jpeg_region import decode_jpeg_region, why_no_region_decoder
        from pipelines.engines.turbojpeg import decode_jpeg

        boxes = None if why_no_region_decoder() else boxes
        self._decoder.reserve(3 * int(samples.sizes.prod(1, dtype=np.int64).max()))
        handle, pixels = self._decoder.handle, self._decoder.pixels
        for position, (height_px, width_px) in enumerate(samples.sizes.tolist()):
            data = samples.image_bytes(position)
            if boxes is None or len(data) < REGION_MIN_BYTES:
                decode_jpeg(handle, data, height_px, width_px, pixels)
                continue
            top_px, left_px = boxes[position, :, :2].min(0).tolist()
            bottom_px, right_px = (boxes[position, :, :2] + boxes[position, :, 2:]).max(0).tolist()
            box = top_px, left_px, bottom_px, right_px
            decode_jpeg_region(data, height_px, width_px, *box, pixels, self._decoder.message)


def repeated_ids(images: ImageSet) -> np.ndarray:
    """Ids of the samples, int64, several times in turn if they are few."""
    return np.arange(RepeatedImages(images).num_samples) % images.num_samples


class RepeatedImages:
    """A data set with its samples repeated if they are few (`samples.ImageSet`)."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images
        self.path, self.identity, self.stored_modes = images.path, images.identity, images.stored_modes
        self.num_samples = images.num_samples * -(-_MIN_EPOCH_IMAGES // images.num_samples)

    @property
    def sizes(self) -> np.ndarray:
        """See `ImageSet.sizes`."""
        return np.resize(self._images.sizes, (self.num_samples, 2))

    @property
    def labels(self) -> np.ndarray:
        """See `ImageSet.labels`."""
        return np.resize(self._images.labels, self.num_samples)

    def samples(self, ids: np.ndarray) -> Samples:
        """See `ImageSet.samples`."""
        return replace(self._images.samples(ids % self._images.num_samples), ids=ids)

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """See `ImageSet.check_unchanged`."""
        self._images.check_unchanged(None if ids is None else ids % self._images.num_samples)


def chained(epoch: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
    """Yield the batches of epochs 0, 1, 2 and so on."""
    return itertools.chain.from_iterable(map(epoch, itertools.count()))
