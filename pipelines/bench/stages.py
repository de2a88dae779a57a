"""Measures each stage of our loader separately on the same batches: the breakdown of the time per image."""

# B batch, V views, Vg views of one size, S its side in pixels

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from pipelines.bad_samples import BadSamples
from pipelines.bench.streams import Job, JpegSamples, build_job_loader, in_order
from pipelines.beton import JPG
from pipelines.shards.open_images import open_images
from pipelines.views import build_view_specs, size_groups

COPY = "copy to the GPU"
STAGES = ("draw", "decode", "crop and resize", "pixel op", COPY, "loader")
# Pixels in the views of all batches: one or two seconds of our loader on one core.
_PIXELS = 5e7


class _Stage(NamedTuple):
    """Work on all batches, and the clock in s that times it."""

    work: Callable[[], Any]
    clock_s: Callable[[], float] = time.process_time  # CPU time of all threads


def measure_stages(job: Job, *, num_repetitions: int, share: float = 1.0) -> dict[str, float]:
    """Measure the CPU time of our loader and of each of its stages separately, in turn, on one core.

    Noise only adds to CPU time, so the minimum over the repetitions is returned. The loader's time minus the sum of
    the stages is its own overhead: sample order, threads and hand-over.

    Args:
        job: What is loaded; its num_threads is not used.
        num_repetitions: Timed rounds, >= 1; one untimed round before them loads or compiles the kernels.
        share: Fraction of the usual number of batches; at least one batch is used.
    Returns:
        Seconds per image by stage, in the order of STAGES; without "decode" unless all images are JPEGs. On a GPU,
        the pixel op and the copy are measured in GPU seconds; COPY is present only there.
    """
    job = replace(job, num_threads=1)
    stages_s: dict[str, float] = {}
    with _one_core(), ExitStack() as opened:
        stages, num_images = _stages(job, _PIXELS * share, opened)
        for repetition in range(num_repetitions + 1):
            for name, (work, clock_s) in stages.items():
                start_s = clock_s()
                work()
                if repetition:
                    stages_s[name] = min(stages_s.get(name, math.inf), (clock_s() - start_s) / num_images)
    # The kernel decodes an image and crops its views in one call; for raw images it only crops.
    stages_s["crop and resize"] = max(stages_s.pop("decode, crop and resize") - stages_s.get("decode", 0.0), 0.0)
    return {name: stages_s[name] for name in STAGES if name in stages_s}


@contextmanager
def _one_core() -> Iterator[None]:
    import torch

    cores, num_torch_threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(num_torch_threads)


def _stages(job: Job, num_pixels: float, opened: ExitStack) -> tuple[dict[str, _Stage], int]:
    """Build the stages, which run separately on the loader's own batches; also returns the number of images.

    The batches are the last ones of an epoch, so the loader makes none before the clock starts, and uses all it makes.
    """
    from kernels.augment import augment
    from kernels.augment.cpu import OutputPool
    from pipelines.engines.decode_crop import BatchDecoder

    loader, views = build_job_loader(job, engine="ffcv"), job.views
    images, order = in_order(job, open_images(job.beton))
    specs = build_view_specs(views)
    num_batches = math.ceil(num_pixels / (job.batch_size * sum(spec.size_px**2 for spec in specs)))
    first_batch = max(0, order.num_batches - num_batches)
    with closing(order.epoch(0, first_batch, 0, 1)) as epoch:
        samples = list(epoch.groups())
    batches = [
        group.samples[first : first + job.batch_size]
        for group in samples
        for first in range(0, len(group.samples), job.batch_size)
    ]
    groups = size_groups(specs)
    pixels = tuple(np.empty((job.batch_size, len(v), size_px, size_px, 3), np.uint8) for size_px, v in groups)
    decoder = BatchDecoder(images, 1, BadSamples(images.path, images.num_samples, 0.0))
    outputs = [OutputPool() for _ in groups]
    opened.callback(loader.close)
    opened.callback(decoder.close)

    def draw() -> list[np.ndarray]:
        return [plan.params for plan in loader.plans(samples)]

    params = draw()

    def decode_and_crop() -> None:
        for batch, drawn in zip(batches, params, strict=True):
            decoder.start(batch.copy(), np.ascontiguousarray(drawn["crop_box"]), groups, pixels).wait()

    def pixel_op(on_device: tuple[Any, ...]) -> None:
        for drawn in params:  # always on the last batch's pixels: the time depends only on the draw
            for group, (_, members), pool in zip(on_device, groups, outputs, strict=True):
                augment(group, drawn[:, members], mean=views.mean, std=views.std, num_threads=1, outputs=pool)

    def load() -> None:
        for _ in loader.epoch(0, first_batch=len(loader) - len(batches)):
            pass

    stages = {
        "draw": _Stage(draw),
        "decode, crop and resize": _Stage(decode_and_crop),
        "pixel op": _Stage(partial(pixel_op, pixels)),
        "loader": _Stage(load),
    }
    if images.stored_modes == (JPG,):
        jpegs = JpegSamples()

        def decode() -> None:
            for batch, drawn in zip(batches, params, strict=True):
                jpegs.decode(batch, drawn["crop_box"])

        stages["decode"] = _Stage(decode)
    if job.device != "cpu":
        stages |= _gpu_stages(job.device, pixels, len(batches), pixel_op)
    return stages, len(batches) * job.batch_size


def _gpu_stages(
    device: str, pixels: tuple[np.ndarray, ...], num_batches: int, pixel_op: Callable[[tuple[Any, ...]], None]
) -> dict[str, _Stage]:
    """Stages that run on a GPU: the pixel op, and the copy of the pixels to the GPU as in the loader."""
    import torch

    def copied() -> tuple[Any, ...]:
        return tuple(torch.from_numpy(group).pin_memory().to(device, non_blocking=True) for group in pixels)

    def copy() -> None:
        for _ in range(num_batches):
            copied()

    def clock_s() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return {"pixel op": _Stage(partial(pixel_op, copied()), clock_s), COPY: _Stage(copy, clock_s)}
