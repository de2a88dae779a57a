"""What is measured, as endless streams of batches: our loader with one of its engines, and bare decoding."""

# B batch

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.beton import JPG, BetonReader
from pipelines.engines import BatchPlan, Engine, Groups, build_engine
from pipelines.sampler import global_batches
from pipelines.views import ViewsConfig

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
    """Build the loader of a job as in training, except that the file's samples are repeated.

    Raises:
        DataError: the engine does not support the file or the device.
    """
    import torch

    from pipelines.loader import DataConfig, Loader

    torch.set_num_threads(job.num_threads)
    reader, device = BetonReader(job.beton), torch.device(job.device)
    bad_samples = BadSamples(reader.path, reader.num_samples, 0.0)
    ahead = {"num_workers": job.num_threads, "prefetch_batches": PREFETCH_BATCHES}
    inner = build_engine(engine, reader, **ahead, device=device, bad_samples=bad_samples)
    cfg = DataConfig(engine=engine, global_batch_size=job.batch_size, **ahead)  # pyright: ignore (a literal)
    return Loader(
        _RepeatedEngine(inner, reader.num_samples),
        job.views,
        reader=repeated_reader(job.beton),
        cfg=cfg,
        bad_samples=bad_samples,
        seed=job.seed,
        rank=0,
        world_size=1,
        device=device,
        num_threads=job.num_threads,
    )


class _RepeatedEngine:
    """An engine that maps sample ids past the end of the file to repeated samples; it holds each image once."""

    def __init__(self, engine: Engine, num_samples: int) -> None:
        self._engine, self._num_samples = engine, num_samples

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        wrapped = (BatchPlan(plan.sample_ids % self._num_samples, plan.params) for plan in plans)
        return self._engine.batches(wrapped, local_batch_size, groups)

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.close()


def open_decode(job: Job) -> Stream:
    """Open a stream of bare libjpeg-turbo decoding: each image is decoded once, nothing else.

    Raises:
        ValueError: the images are not stored as JPEG.
    """
    from pipelines.convert import bounded_map

    reader = repeated_reader(job.beton)
    if (reader.modes != JPG).any():
        raise ValueError("the images are not stored as JPEG")
    own = threading.local()

    def decode(sample_ids: np.ndarray) -> None:
        if not hasattr(own, "decoder"):
            own.decoder = JpegSamples(reader)
        own.decoder.decode(sample_ids)

    ids = np.arange(reader.num_samples)
    order = chained(lambda epoch: iter(global_batches(ids, job.seed, epoch, job.batch_size)))
    num_ahead = 2 * job.num_threads
    batches = bounded_map(decode, order, ThreadPoolExecutor(job.num_threads), max_ahead=num_ahead)
    return Stream(batches, num_ahead)


class JpegSamples:
    """Decodes samples of a .beton file with libjpeg-turbo, one after the other, and discards the pixels."""

    def __init__(self, reader: BetonReader) -> None:
        from pipelines.engines.turbojpeg import JpegDecoder

        self._reader = reader
        self._decoder = JpegDecoder()
        self._decoder.reserve(3 * int(reader.sizes.prod(1).max()))

    def decode(self, sample_ids: np.ndarray) -> None:
        """Decode the samples `sample_ids`, int64 [num]."""
        from pipelines.engines.turbojpeg import decode_jpeg

        handle, pixels = self._decoder.handle, self._decoder.pixels
        for i in sample_ids:
            height_px, width_px = self._reader.sizes[i]
            decode_jpeg(handle, self._reader.image_bytes(i), int(height_px), int(width_px), pixels)


def repeated_reader(beton: str) -> BetonReader:
    """A reader of the file, with its samples repeated if they are few."""
    reader = BetonReader(beton)
    times = -(-_MIN_EPOCH_IMAGES // reader.num_samples)
    for name in ("sizes", "labels", "modes", "data_ptr", "data_bytes"):
        setattr(reader, name, np.concatenate([getattr(reader, name)] * times))
    reader.num_samples *= times
    return reader


def chained(epoch: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
    """Yield the batches of epochs 0, 1, 2 and so on."""
    return itertools.chain.from_iterable(map(epoch, itertools.count()))
