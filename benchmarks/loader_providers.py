"""The ways to load images that `bench_loader` compares, and the process in which each of them runs."""

# B batch, S side of a view in pixels

from __future__ import annotations

import ctypes
import io
import itertools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from pipelines.beton import JPG, BetonReader
from pipelines.sampler import global_batches
from pipelines.view_spec import Range
from pipelines.views import ViewsConfig, ViewSpec, build_view_specs

if TYPE_CHECKING:
    from pipelines.loader import Loader

FULL_RECIPE, PLAIN_OPERATIONS = "full recipe", "crop, flip, normalise"
# The fields that leave of a recipe what stock FFCV does too: random resized crop, flip, normalise.
_PLAIN = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0}
# A small set is gone through several times in an epoch: real epochs are long, and no provider is to pay for a
# restart every few batches.
_MIN_EPOCH_IMAGES = 10_000
_PREFETCH_BATCHES = 3
_START_TIMEOUT_S = 240.0  # all start at the same time, and stock FFCV compiles for 10 to 50 s on an idle machine


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a provider is to load."""

    beton: str  # the file
    recipe: str  # a key of `pipelines.views.RECIPES`
    batch_size: int  # B
    num_threads: int  # cores to pin to, and threads or workers to use
    seed: int  # of the order and the draw


@dataclass(frozen=True)
class Stream:
    """Batches of B images without end."""

    batches: Iterator[Any]
    num_ahead: int  # batches that may lie ready while nobody asks


@dataclass(frozen=True)
class Window:
    """What one timing window gave."""

    img_per_s: float  # source images
    # Share of the pinned cores' time that other programs, or other guests of the same host, took. It does not hit
    # all alike: a provider with more threads loses less.
    busy_elsewhere_fraction: float


@dataclass(frozen=True)
class Provider:
    """A way to load images."""

    label: str  # in the results
    operations: str  # what is done to each image
    open: Callable[[Job], Stream]  # starts it; ImportError or ValueError where it cannot serve the job


def open_ours(job: Job, *, engine: str = "ffcv", override: dict[str, Any] | None = None) -> Stream:
    """This package's loader, as training builds it."""
    loader = build_ours(job, engine=engine, override=override)
    return Stream(_chained(loader.epoch), _PREFETCH_BATCHES + 1)


def build_ours(job: Job, *, engine: str = "ffcv", override: dict[str, Any] | None = None) -> Loader:
    """This package's loader; ViewSpec fields in `override` are set in every view of the recipe."""
    import torch

    from pipelines.loader import DataConfig, build_loader

    torch.set_num_threads(job.num_threads)
    data = DataConfig(
        engine=engine,  # pyright: ignore[reportArgumentType]
        global_batch_size=job.batch_size,
        num_workers=job.num_threads,
        prefetch_batches=_PREFETCH_BATCHES,
    )
    return build_loader(
        repeated_reader(job.beton),
        data,
        ViewsConfig(recipe=job.recipe, override=override or {}),
        seed=job.seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        num_threads=job.num_threads,
    )


def open_stock_ffcv(job: Job) -> Stream:
    """FFCV as it comes, compiled: its Loader decodes an image once for each of its two pipelines."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    views = ViewsConfig(recipe=job.recipe)
    mean, std = np.asarray(views.mean) * 255, np.asarray(views.std) * 255

    def pipeline(spec: ViewSpec) -> PipelineSpec:
        crop = RandomResizedCropRGBImageDecoder((spec.size_px, spec.size_px), spec.crop_scale, spec.crop_ratio)
        normalise = NormalizeImage(mean, std, np.float32)  # pyright: ignore[reportArgumentType]
        return PipelineSpec("image", crop, [RandomHorizontalFlip(spec.flip_p), normalise, ToTensor(), ToTorchImage()])

    first, second = map(pipeline, build_view_specs(views))
    loader = Loader(
        job.beton,
        batch_size=job.batch_size,
        num_workers=job.num_threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=job.seed,
        indices=np.arange(repeated_reader(job.beton).num_samples) % BetonReader(job.beton).num_samples,  # pyright: ignore
        pipelines={"image": first, "image_b": second, "label": None},  # pyright: ignore[reportArgumentType]
        drop_last=True,
        batches_ahead=_PREFETCH_BATCHES,
    )
    return Stream(_chained(lambda _: iter(loader)), _PREFETCH_BATCHES + 1)


TorchvisionForm = Literal["pil", "pil_pillow_blur", "tensor"]


def open_torchvision(job: Job, *, form: TorchvisionForm) -> Stream:
    """torchvision v2 in a DataLoader: a worker a core with one torch thread, one decode for both views.

    `form` is what v2 works on: Pillow images, the same with Pillow's approximate blur, or uint8 tensors.
    """
    import torch
    from torch.utils.data import DataLoader

    from kernels.torchvision_cpu import import_torchvision

    import_torchvision()
    torch.manual_seed(job.seed)
    prefetch_factor = 2
    loader = DataLoader(
        _TorchvisionViews(job, form),  # pyright: ignore[reportArgumentType] (a protocol)
        job.batch_size,
        shuffle=True,
        num_workers=job.num_threads,
        drop_last=True,
        collate_fn=_normalised_batch,
        persistent_workers=True,
        worker_init_fn=_end_with_parent,
        multiprocessing_context="fork",  # Linux's default, which a spawned process does not have
        prefetch_factor=prefetch_factor,
    )
    return Stream(_chained(lambda _: iter(loader)), prefetch_factor * job.num_threads)


class _TorchvisionViews:
    """Image -> its views, uint8 [3, S, S] each."""

    def __init__(self, job: Job, form: TorchvisionForm) -> None:
        self._form = form
        self._reader = repeated_reader(job.beton)
        self._transforms = [_torchvision_view(spec, form) for spec in build_view_specs(ViewsConfig(recipe=job.recipe))]

    def __len__(self) -> int:
        return self._reader.num_samples

    def __getitem__(self, i: int) -> list[Any]:
        from torchvision.transforms.v2.functional import pil_to_tensor

        if self._reader.modes[i] == JPG:
            image = Image.open(io.BytesIO(self._reader.image_bytes(i).tobytes())).convert("RGB")
        else:
            image = Image.fromarray(self._reader.decode(i))
        if self._form == "tensor":
            image = pil_to_tensor(image)
        return [transform(image) for transform in self._transforms]


def _torchvision_view(spec: ViewSpec, form: TorchvisionForm) -> Callable[[Any], Any]:
    """The recipe of one view in torchvision's own operations, those that it does not need left out."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps: list[Any] = [
        v2.RandomResizedCrop(spec.size_px, spec.crop_scale, spec.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(spec.flip_p),
        v2.RandomApply([jitter], spec.jitter_p),
        v2.RandomGrayscale(spec.grayscale_p),
    ]
    if form == "pil_pillow_blur":
        if not spec.blur_p:
            raise ValueError("the recipe has no blur")
        steps.append(v2.RandomApply([v2.Lambda(lambda image: _pillow_blur(image, spec.blur_sigma))], spec.blur_p))
    elif spec.blur_p:
        steps.append(v2.RandomApply([v2.GaussianBlur(spec.blur_kernel_px, spec.blur_sigma)], spec.blur_p))
    if spec.solarize_p:
        steps.append(v2.RandomSolarize(255 * spec.solarize_threshold, spec.solarize_p))
    return v2.Compose(steps if form == "tensor" else [*steps, v2.PILToTensor()])


def _pillow_blur(image: Image.Image, sigma_px: Range) -> Image.Image:
    """As MoCo v2's authors have it: box blurs that come near a Gaussian."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma_px)))


def _normalised_batch(samples: list[list[Any]]) -> list[Any]:
    """Views of B images -> float32 [B, 3, S, S] a view; at once, which is much faster than image by image."""
    import torch
    from torchvision.transforms.v2 import functional as v2

    views = ViewsConfig()
    batches = [v2.to_dtype(torch.stack(group), torch.float32, scale=True) for group in zip(*samples, strict=True)]
    return [v2.normalize(batch, list(views.mean), list(views.std), inplace=True) for batch in batches]


def open_decode(job: Job) -> Stream:
    """libjpeg-turbo alone: each image decoded once, nothing else."""
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
    order = _chained(lambda epoch: iter(global_batches(ids, job.seed, epoch, job.batch_size)))
    num_ahead = 2 * job.num_threads
    batches = bounded_map(decode, order, ThreadPoolExecutor(job.num_threads), max_ahead=num_ahead)
    return Stream(batches, num_ahead)


class JpegSamples:
    """Decodes samples of a .beton with libjpeg-turbo, one after the other, and drops their pixels."""

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


PROVIDERS = {
    "ours": Provider("fastssl, ffcv engine", FULL_RECIPE, open_ours),
    "ours_plain": Provider("fastssl, ffcv engine", PLAIN_OPERATIONS, partial(open_ours, override=_PLAIN)),
    "stock_ffcv": Provider("stock FFCV, two decodes", PLAIN_OPERATIONS, open_stock_ffcv),
    "torchvision_pil": Provider("torchvision v2, PIL", FULL_RECIPE, partial(open_torchvision, form="pil")),
    "torchvision_tensor": Provider(
        "torchvision v2, uint8 tensors", FULL_RECIPE, partial(open_torchvision, form="tensor")
    ),
    "torchvision_pil_pillow_blur": Provider(
        "torchvision v2, PIL, Pillow's blur", FULL_RECIPE, partial(open_torchvision, form="pil_pillow_blur")
    ),
    "decode": Provider("libjpeg-turbo", "decode only", open_decode),
    "synthetic": Provider(
        "fastssl, synthetic engine", "full recipe without decode and crop", partial(open_ours, engine="synthetic")
    ),
}


class Worker:
    """A provider in its own process, which is stopped whenever it is not starting or being measured.

    Left alone, the workers of a DataLoader go on for seconds to fill their queues, beside the next provider's window.
    """

    def __init__(self, name: str, job: Job) -> None:
        self.reason: str | None = None  # why there is no figure
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, job, theirs))
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait until it has compiled and made its first batches."""
        self._receive(_START_TIMEOUT_S)
        self._signal(signal.SIGSTOP)

    def measure(self, window_s: float) -> Window | None:
        """One window; None where there is no figure, and then `reason` says why."""
        if self.reason:
            return None
        self._signal(signal.SIGCONT)
        self._connection.send(window_s)
        window = self._receive(10 * window_s + 60)
        self._signal(signal.SIGSTOP)
        return window

    def close(self) -> None:
        """Ask the process to end, and end it where it does not."""
        self._signal(signal.SIGCONT)
        self._connection.close()  # which ends its loop
        self._process.join(10)
        self._process.kill()
        self._process.join()

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children, as far as they are still there."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(number)

    def _receive(self, timeout_s: float) -> Window | None:
        try:
            answer = self._connection.recv() if self._connection.poll(timeout_s) else f"no answer in {timeout_s:.0f} s"
        except EOFError:
            answer = "its process ended"
        if isinstance(answer, Window):
            return answer
        self.reason = answer
        self._process.kill()  # it is not to take the cores from the others
        return None


def _serve(name: str, job: Job, connection: Connection) -> None:
    """The process of one provider: warm up, say so, then a window for every request until the pipe closes."""
    _end_with_parent()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.num_threads])
    try:
        stream = PROVIDERS[name].open(job)
        connection.send(_measure(stream, job, 0.0))  # compiles, starts threads and workers
        while True:
            connection.send(_measure(stream, job, connection.recv()))
    except (EOFError, BrokenPipeError):  # the parent is done, or gone
        pass
    except Exception as error:
        connection.send(" ".join(f"{type(error).__name__}: {error}".split()))
    os._exit(0)  # DataLoader's workers end with their parent; FFCV's threads might never


def _end_with_parent(_: int = 0) -> None:
    """Have Linux kill this process as soon as its parent is gone: what is stopped would stay for ever."""
    parent = multiprocessing.parent_process()
    if sys.platform != "linux" or parent is None:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent.pid:  # gone before the call
        os._exit(1)


def _measure(stream: Stream, job: Job, window_s: float) -> Window:
    """One window. What lay ready is thrown away first, and whole rounds of the workers are counted."""
    num_rounds = -(-stream.num_ahead // job.num_threads) + 1
    for _ in range(num_rounds * job.num_threads):
        next(stream.batches)
    others_s = _cpu_s_of_others()
    num_batches, start_s, elapsed_s = 0, time.perf_counter(), 0.0
    while not num_batches or elapsed_s < window_s:
        for _ in range(job.num_threads):
            next(stream.batches)
        num_batches += job.num_threads
        elapsed_s = time.perf_counter() - start_s
    busy = (_cpu_s_of_others() - others_s) / (elapsed_s * job.num_threads)
    return Window(num_batches * job.batch_size / elapsed_s, min(max(busy, 0.0), 1.0))


def _cpu_s_of_others() -> float:
    """Time that the cores of this process spent on anything but it and its children."""
    import psutil

    cores = psutil.cpu_times(percpu=True)
    used_s = sum(sum(cores[i]) - cores[i].idle - cores[i].iowait - cores[i].guest for i in os.sched_getaffinity(0))
    this = psutil.Process()
    own_s = sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))
    return used_s - own_s


def repeated_reader(beton: str) -> BetonReader:
    """The file's samples, several times over where they are few."""
    reader = BetonReader(beton)
    times = -(-_MIN_EPOCH_IMAGES // reader.num_samples)
    for name in ("sizes", "labels", "modes", "data_ptr", "data_bytes"):
        setattr(reader, name, np.concatenate([getattr(reader, name)] * times))
    reader.num_samples *= times
    return reader


def _chained(epoch: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
    """The batches of epoch 0, 1, 2 and so on."""
    return itertools.chain.from_iterable(map(epoch, itertools.count()))
