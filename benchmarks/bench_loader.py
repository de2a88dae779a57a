"""Loading throughput beside its peers, in one run on one machine: source images a second, two views of each.

Every provider (benchmarks/loader_providers.py) has a process of its own, pinned to the same cores. The parent asks one
after the other for a timing window and goes round several times, so that noise on the machine hits all of them alike.
"""

# B batch, V views, Vg views of one size, S its side in pixels

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.loader_providers import (
    FULL_RECIPE,
    PLAIN_OPERATIONS,
    PROVIDERS,
    Job,
    JpegSamples,
    Window,
    Worker,
    build_ours,
    repeated_reader,
)
from benchmarks.record import Value, append_rows, environment_columns, format_table, spread
from pipelines.bad_samples import BadSamples
from pipelines.beton import JPG, BetonReader
from pipelines.errors import DataError
from pipelines.sampler import global_batches
from pipelines.views import ViewsConfig, build_view_specs, size_groups

Row = dict[str, Value]

_RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "torchvision", "ffcv", "numba", "numpy", "pillow")
_MAX_BUSY_ELSEWHERE = 0.1  # more, and ratios say little
# In the file, not in the table.
_HIDDEN = ("recipe", "num_threads", "local_batch_size", "repetitions", "window_s", "seed")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A ratio of a provider to the fastest of its peers that has to be reached."""

    name: str
    provider: str
    peers: tuple[str, ...]
    least: float
    goal: float | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A data set with its recipe."""

    name: str
    recipe: str
    batch_size: int
    profile_batches: int  # a few seconds of our loader on one core
    targets: tuple[Target, ...]


# Both with torchvision's own operations; Pillow's approximate blur is not one of them.
_TORCHVISION = ("torchvision_pil", "torchvision_tensor")
_STOCK_TARGET = Target(name="like for like beside stock FFCV", provider="ours_plain", peers=("stock_ffcv",), least=1.5)
WORKLOADS = (
    Workload(
        name="photographs",
        recipe="byol",
        batch_size=64,
        profile_batches=8,
        targets=(
            Target(name="beside torchvision", provider="ours", peers=_TORCHVISION, least=5, goal=8),
            _STOCK_TARGET,
            Target(name="share of bare decode", provider="ours", peers=("decode",), least=0.5),
        ),
    ),
    Workload(
        name="cifar10",
        recipe="simclr",
        batch_size=256,
        profile_batches=80,
        targets=(
            Target(name="beside torchvision", provider="ours", peers=_TORCHVISION, least=10, goal=20),
            _STOCK_TARGET,
        ),
    ),
)


def compare(workload: Workload, job: Job, args: argparse.Namespace) -> dict[str, Row]:
    """Measure the providers of one workload in turns; one row a provider."""
    names = args.providers
    windows: dict[str, list[Window]] = {name: [] for name in names}
    with ExitStack() as stack:
        _say(f"{workload.name}: starting {', '.join(names)}")
        workers = {name: Worker(name, job) for name in names}
        for worker in workers.values():
            stack.callback(worker.close)
        for worker in workers.values():
            worker.wait_until_ready()
        for repetition in range(args.repetitions):
            _say(f"{workload.name}: repetition {repetition + 1} of {args.repetitions}")
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                window = workers[name].measure(args.seconds)
                windows[name] += [window] if window else []
    reasons = {name: worker.reason for name, worker in workers.items()}
    middle = {name: spread([w.img_per_s for w in windows[name]])["p50"] for name in names if not reasons[name]}
    own = {
        "recipe": job.recipe,
        "num_threads": job.num_threads,
        "local_batch_size": job.batch_size,
        "window_s": args.seconds,
        "seed": job.seed,
    }
    return {
        name: {"workload": workload.name, **_figures(name, windows[name], reasons[name], middle), **own}
        for name in names
    }


def _figures(name: str, windows: list[Window], reason: str | None, middle: Mapping[str, float]) -> Row:
    """What was measured of one provider; `middle` holds the medians of all that were."""
    provider = PROVIDERS[name]
    full, plain = provider.operations == FULL_RECIPE, provider.operations == PLAIN_OPERATIONS
    img_per_s = dict.fromkeys(("p50", "min", "max")) if reason else spread([w.img_per_s for w in windows])
    busy = None if reason else round(spread([w.busy_elsewhere_fraction for w in windows])["p50"], 3)
    return {
        "provider": provider.label,
        "operations": provider.operations,
        **{f"img_per_s_{key}": None if value is None else round(value, 1) for key, value in img_per_s.items()},
        "ratio_to_torchvision": _ratio(name, _TORCHVISION, middle) if full else None,
        "ratio_to_torchvision_pillow_blur": _ratio(name, ("torchvision_pil_pillow_blur",), middle) if full else None,
        "ratio_to_stock_ffcv": _ratio(name, ("stock_ffcv",), middle) if plain else None,
        "share_of_bare_decode": _ratio(name, ("decode",), middle),
        "busy_elsewhere_fraction": busy,
        "repetitions": len(windows),
        "note": f"not measured: {reason}" if reason else "",
    }


def _ratio(name: str, peers: tuple[str, ...], middle: Mapping[str, float]) -> float | None:
    """To the fastest of the peers, of medians; None where one side was not measured."""
    found = [middle[peer] for peer in peers if peer in middle]
    return round(middle[name] / max(found), 3) if found and name in middle else None


def verdicts(workload: Workload, rows: Mapping[str, Row]) -> Iterator[str]:
    """One line a target, from the rows by provider; no judgement where other programs took much of the cores."""
    middle = {name: float(row["img_per_s_p50"]) for name, row in rows.items() if row["img_per_s_p50"] is not None}
    for target in workload.targets:
        ratio = _ratio(target.provider, target.peers, middle)
        concerned = [rows[name] for name in (target.provider, *target.peers) if name in middle]
        busy = max((float(row["busy_elsewhere_fraction"] or 0) for row in concerned), default=0.0)
        if ratio is None:
            verdict = "not measured"
        elif busy > _MAX_BUSY_ELSEWHERE:
            verdict = f"not judged: other programs took {busy:.0%} of the cores"
        else:
            verdict = "PASS" if ratio >= target.least else "MISS"
            if target.goal:
                verdict += f", goal {'reached' if ratio >= target.goal else 'not reached'}"
        wanted = f">= {target.least:g}" + (f" (goal {target.goal:g})" if target.goal else "")
        yield f"{workload.name}: {target.name}: {ratio or '-'}, target {wanted}: {verdict}"


def profile(workload: Workload, job: Job, args: argparse.Namespace) -> list[Row]:
    """CPU time of our loader and of each of its stages alone, on one core, in turns; one row a stage.

    Noise only adds to CPU time, so the least of the repetitions counts.
    """
    import torch

    job = replace(job, num_threads=1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    stages, num_images = _stages(job, workload.profile_batches)
    cpu_s = dict.fromkeys(stages, math.inf)
    for repetition in range(args.repetitions + 1):
        for stage, work in stages.items():
            start_s = time.process_time()  # of all threads
            work()
            if repetition:  # the first loads or compiles the kernels
                cpu_s[stage] = min(cpu_s[stage], (time.process_time() - start_s) / num_images)
    # The kernel decodes an image and cuts its views in one call; raw images it only cuts.
    cpu_s["crop and resize"] = cpu_s.pop("decode, crop and resize") - cpu_s.get("decode", 0.0)
    return [
        {
            "workload": workload.name,
            "stage": stage,
            "cpu_us_per_image_min": round(1e6 * cpu_s[stage], 1),
            "share_of_loader": round(cpu_s[stage] / cpu_s["loader"], 3),
            "recipe": job.recipe,
            "num_threads": 1,
            "local_batch_size": job.batch_size,
            "repetitions": args.repetitions,
            "seed": job.seed,
        }
        for stage in ("draw", "decode", "crop and resize", "pixel op", "loader")
        if stage in cpu_s
    ]


def _stages(job: Job, num_batches: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """The stages of our loader, each to be run alone on the same batches as the loader cuts them, and their images.

    They are the last of an epoch: the loader makes none ahead of the clock, and none for nobody.
    """
    from kernels.augment import augment
    from kernels.augment.cpu import OutputPool
    from pipelines.engines.decode_crop import BatchDecoder

    loader, reader, views = build_ours(job), repeated_reader(job.beton), ViewsConfig(recipe=job.recipe)
    batches = global_batches(np.arange(reader.num_samples), job.seed, 0, job.batch_size)[-num_batches:]
    groups = size_groups(build_view_specs(views))
    pixels = tuple(np.empty((job.batch_size, len(v), size_px, size_px, 3), np.uint8) for size_px, v in groups)
    decoder = BatchDecoder(reader, 1, BadSamples(reader.path, reader.num_samples, 0.0))
    outputs = [OutputPool() for _ in groups]

    def draw() -> list[np.ndarray]:
        draw_batch = loader._draw_ahead(0, batches)  # several batches at a time
        return [draw_batch(ids, reader.sizes[ids]) for ids in batches]

    params = draw()

    def decode_and_crop() -> None:
        for ids, drawn in zip(batches, params, strict=True):
            decoder.start(reader.mmap, ids, np.ascontiguousarray(drawn["crop_box"]), groups, pixels).wait()

    def pixel_op() -> None:
        for drawn in params:  # on the last batch's pixels: the time depends on the draw only
            for group, (_, members), pool in zip(pixels, groups, outputs, strict=True):
                augment(group, drawn[:, members], mean=views.mean, std=views.std, num_threads=1, outputs=pool)

    def load() -> None:
        for _ in loader.epoch(0, first_batch=len(loader) - len(batches)):
            pass

    stages = {"draw": draw, "decode, crop and resize": decode_and_crop, "pixel op": pixel_op, "loader": load}
    if (reader.modes == JPG).all():
        stages["decode"] = partial(JpegSamples(reader).decode, batches.reshape(-1))
    return stages, batches.size


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photographs", type=Path, metavar="X", help=".beton of photographs")
    parser.add_argument("--cifar10", type=Path, metavar="X", help=".beton of CIFAR-10's training images")
    num_cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=num_cores, help="cores to use (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a timing window (default: 2)")
    parser.add_argument("--repetitions", type=int, default=5, help="windows a provider (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--profile", action="store_true", help="CPU time of our stages instead of the comparison")
    parser.add_argument("--out", type=Path, help="CSV to append to (default: benchmarks/results/loader*.csv)")
    args = parser.parse_args(argv)
    if not args.photographs and not args.cifar10:
        parser.error("give --photographs or --cifar10, or both")
    if not 1 <= args.threads <= num_cores:
        parser.error(f"--threads must be in 1..{num_cores}, the cores of this process, got {args.threads}")
    if args.seconds <= 0 or args.repetitions < 1:
        parser.error("--seconds must be > 0 and --repetitions >= 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, record.

    Returns:
        Exit code: 0, also where a target is missed; 2 for bad input, after one line.
    """
    args = _parse(argv)
    try:
        _run(args)
    except (DataError, ValueError) as error:
        _say(f"bench_loader: error: {' '.join(str(error).split())}")
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    betons = {workload: path for workload in WORKLOADS if (path := getattr(args, workload.name))}
    for path in betons.values():
        BetonReader(path)  # a bad file is to be known before the first is measured
    environment = environment_columns(_PACKAGES)  # before the run: the commit that is measured
    out = args.out or _RESULTS / ("loader_profile.csv" if args.profile else "loader.csv")
    for workload, beton in betons.items():
        job = Job(
            beton=str(beton),
            recipe=workload.recipe,
            batch_size=workload.batch_size,
            num_threads=args.threads,
            seed=args.seed,
        )
        compared = {} if args.profile else compare(workload, job, args)
        rows = profile(workload, job, args) if args.profile else list(compared.values())
        append_rows(out, [row | environment for row in rows])  # now: a run that is ended keeps what it has
        print(format_table(rows, [name for name in rows[0] if name not in _HIDDEN]))
        if compared:
            print(*verdicts(workload, compared), sep="\n")
        print(flush=True)
    print(f"{environment['cpu']}, {1 if args.profile else args.threads} cores; rows appended to {out}")


if __name__ == "__main__":
    sys.exit(main())
