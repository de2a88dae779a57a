"""`fastssl bench loader`: measures every engine and the stages on a user's file and machine; finds the bottleneck."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from pipelines.bench.disk import DiskSpeed, measure_disk
from pipelines.bench.remote import measure_ranges
from pipelines.bench.stages import COPY, measure_stages
from pipelines.bench.streams import Job, in_order, open_decode, open_engine
from pipelines.bench.verdict import Figures, advice
from pipelines.bench.windows import Measured, Open, measure_in_turns
from pipelines.engines import EngineName
from pipelines.errors import DataError, did_you_mean
from pipelines.read_ahead import available_memory_bytes
from pipelines.shards.expectation import describe_expectation, expect
from pipelines.shards.open_images import names_dataset, open_images
from pipelines.shards.sharded_images import ShardedImages
from pipelines.views import build_view_specs

ENGINES = tuple(name for name in get_args(EngineName) if name != "synthetic")
_CEILING, _DECODE = "synthetic ceiling", "libjpeg-turbo alone"
_MAX_BUSY_ELSEWHERE = 0.1  # above this, the figures are unreliable
_USUAL_WINDOW_S = 2.0
_NETWORK = "network, blocks of shards"
_MOST_SIZES = 64  # images whose size is looked at; of remote shards, a request for each

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class LoaderReport:
    """Result of `bench_loader`.

    Attributes:
        rows: One for each engine, the ceiling, bare decoding, and each stage; all with the same keys, not rounded.
        sentences: At most three sentences: the bottleneck of this machine and what to change.
        warning: Why the figures may be unreliable; None if nothing was found.
    """

    rows: list[Row]
    sentences: list[str]
    warning: str | None


def check_job(job: Job, engines: Sequence[str], window_s: float) -> None:
    """Check everything that can be checked before measuring.

    Raises:
        DataError: something is wrong; the message is one line.
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown or not engines:
        hint = did_you_mean(unknown[0], ENGINES) if unknown else ""
        raise DataError(f"--engines must be of {', '.join(ENGINES)}, got {', '.join(unknown) or 'none'}{hint}")
    num_cores = len(os.sched_getaffinity(0))
    if not 1 <= job.num_threads <= num_cores:
        raise DataError(f"--threads must be in 1..{num_cores}, the cores of this process, got {job.num_threads}")
    if not window_s > 0:
        raise DataError(f"--seconds must be > 0, got {window_s:g}")
    num_samples = open_images(job.beton).num_samples
    if not 1 <= job.batch_size <= num_samples:
        raise DataError(f"--batch-size must be in 1..{num_samples}, the images of {job.beton}, got {job.batch_size}")


def bench_loader(
    job: Job,
    engines: Sequence[str] = ENGINES,
    *,
    window_s: float = _USUAL_WINDOW_S,
    num_repetitions: int = 3,
    say: Callable[[str], None] = lambda message: None,
) -> LoaderReport:
    """Measure the disk, the engines in turn, and the stages.

    Args:
        job: What is loaded, and where the batches go.
        engines: Names from ENGINES. An engine that cannot read the file on this machine gets a row with the reason.
        window_s: Length of one measurement in seconds, > 0.
        num_repetitions: Measurements of each, >= 1.
        say: Called with progress messages.
    Raises:
        DataError: the job cannot be run, or no engine can read the file.
    """
    check_job(job, engines, window_s)
    source_rows, disk = _measure_source(job, window_s, say)
    streams: dict[str, Open] = {_engine(name): partial(open_engine, engine=name) for name in dict.fromkeys(engines)}
    streams |= {_CEILING: partial(open_engine, engine="synthetic"), _DECODE: open_decode}
    measured = measure_in_turns(streams, job, num_repetitions=num_repetitions, window_s=window_s, say=say)
    speeds = {name: _middle(found) for name, found in measured.items() if found.reason is None}
    engine_speeds = {name: speeds[_engine(name)] for name in engines if _engine(name) in speeds}
    if not engine_speeds:
        raise DataError("; ".join(f"{_engine(name)}: {measured[_engine(name)].reason}" for name in engines))
    say("stages")
    stages_s = measure_stages(job, num_repetitions=num_repetitions, share=window_s / _USUAL_WINDOW_S)
    rows = [_stream_row(name, found) for name, found in measured.items()]
    rows += source_rows
    rows += [_stage_row(name, seconds, job) for name, seconds in stages_s.items() if name != "loader"]
    figures = _figures(job, engine_speeds, speeds.get(_CEILING), disk, stages_s)
    return LoaderReport(rows, [*advice(figures), *_expected(job, source_rows)], _warning(measured))


def _measure_source(
    job: Job, window_s: float, say: Callable[[str], None]
) -> tuple[list[Row], tuple[DiskSpeed, DiskSpeed]]:
    """Rows of where the images come from, and the disk's speeds, which are unknown of many files and of a network."""
    if not names_dataset(job.beton):
        say("disk")  # first: a process that has the file mapped keeps its pages in memory
        disk = measure_disk(Path(job.beton), seed=job.seed, num_threads=job.num_threads, seconds=window_s)
        return [_disk_row("disk, order of an epoch", disk[0]), _disk_row("disk, sequential", disk[1])], disk
    unknown = DiskSpeed(None, None, "not measured: many files")
    images = open_images(job.beton)
    if not isinstance(images, ShardedImages) or not images.is_remote:
        return [_disk_row("disk, order of an epoch", unknown)], (unknown, unknown)
    say("network")
    speed = measure_ranges(images, seconds=window_s, seed=job.seed)
    images.files.close()
    network = DiskSpeed(speed.bytes_per_s, speed.img_per_s, f"{speed.num} blocks")
    return [_disk_row(_NETWORK, network)], (network, unknown)


def _expected(job: Job, source_rows: Sequence[Row]) -> Iterator[str]:
    """What a training on remote shards fetches, and when its first batch is there."""
    rate = next((row["mb_per_s"] for row in source_rows if row["measured"] == _NETWORK), None)
    if not isinstance(rate, float):
        return
    images = open_images(job.beton)
    assert isinstance(images, ShardedImages)
    found = expect(images, in_order(job, images)[1], global_batch_size=job.batch_size, num_nodes=1)
    yield f"{describe_expectation(found, None)}, which takes about {found.first_bytes / 1e6 / rate:.1f} s."


def _engine(name: str) -> str:
    return f"engine {name}"


def _middle(found: Measured) -> float:
    return statistics.median(window.img_per_s for window in found.windows)


def _busy(found: Measured) -> float:
    return statistics.median(window.busy_elsewhere_fraction for window in found.windows)


def _figures(
    job: Job,
    engine_speeds: dict[str, float],
    synthetic_img_per_s: float | None,
    disk: tuple[DiskSpeed, DiskSpeed],
    stages_s: dict[str, float],
) -> Figures:
    images, specs = open_images(job.beton), build_view_specs(job.views)
    num_file_bytes = images.manifest.num_bytes if isinstance(images, ShardedImages) else len(images.mmap)
    some = np.linspace(0, images.num_samples - 1, min(images.num_samples, _MOST_SIZES)).astype(np.int64)
    rows = images.few_rows(some) if isinstance(images, ShardedImages) else None
    sides_px = images.sizes.max(1) if rows is None else np.maximum(rows["height"], rows["width"])
    return Figures(
        engines_img_per_s=engine_speeds,
        synthetic_img_per_s=synthetic_img_per_s,
        disk_img_per_s=disk[0].img_per_s,
        disk_sequential_img_per_s=disk[1].img_per_s,
        stages_s=stages_s,
        num_threads=job.num_threads,
        num_cores=len(os.sched_getaffinity(0)),
        num_file_bytes=num_file_bytes,
        fits_in_memory=num_file_bytes < available_memory_bytes(),
        image_px=int(np.median(sides_px)),
        view_px=max(spec.size_px for spec in specs),
        blurs=any(spec.blur_p > 0 for spec in specs),
    )


def _row(
    name: str,
    img_per_s: Sequence[float | None],
    *,
    us_per_image: float | None = None,
    mb_per_s: float | None = None,
    busy: float | None = None,
    note: str = "",
) -> Row:
    middle, least, largest = img_per_s
    return {
        "measured": name,
        "img_per_s_p50": middle,
        "img_per_s_min": least,
        "img_per_s_max": largest,
        "us_per_image": us_per_image,
        "mb_per_s": mb_per_s,
        "busy_elsewhere_fraction": busy,
        "note": note,
    }


def _stream_row(name: str, found: Measured) -> Row:
    if found.reason is not None:
        return _row(name, (None, None, None), note=f"not measured: {found.reason}")
    speeds = [window.img_per_s for window in found.windows]
    return _row(name, (_middle(found), min(speeds), max(speeds)), busy=_busy(found))


def _disk_row(name: str, speed: DiskSpeed) -> Row:
    mb_per_s = None if speed.bytes_per_s is None else speed.bytes_per_s / 1e6
    return _row(name, (speed.img_per_s, None, None), mb_per_s=mb_per_s, note=speed.note)


def _stage_row(name: str, seconds: float, job: Job) -> Row:
    """Row of one stage: its time per image on one core, and the speed if all threads ran only this stage."""
    on_gpu = job.device != "cpu" and name in ("pixel op", COPY)
    img_per_s = (1 if on_gpu else job.num_threads) / seconds if seconds else None
    return _row(name, (img_per_s, None, None), us_per_image=1e6 * seconds, note="time of the GPU" if on_gpu else "")


def _warning(measured: dict[str, Measured]) -> str | None:
    busy = max(_busy(found) for found in measured.values() if found.reason is None)
    if busy <= _MAX_BUSY_ELSEWHERE:
        return None
    return f"other programs took {busy:.0%} of the cores while this was measured: close them and measure again"
