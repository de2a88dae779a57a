"""Loading from a slow disk with an empty page cache: images per second by order and read-ahead, in alternation.

Control groups (blkio, version 1) limit the disk to --reads-per-s and --mb-per-s; this needs root.
"""

import argparse
import mmap
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastssl.tracking.result_rows import append_rows, environment_columns, format_table, spread
from pipelines.bench.disk import drop_from_cache
from pipelines.beton import BetonReader
from pipelines.errors import DataError

_RESULTS = Path(__file__).resolve().parent / "results"
_GROUP = Path("/sys/fs/cgroup/blkio/fastssl-bench-disk")
_PACKAGES = ("torch", "ffcv", "numpy")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement: the first seconds of an epoch."""

    beton: str
    seconds: float
    batch_size: int
    seed: int
    window_mb: int
    order: str = "random"
    cache: str = "os"
    read_ahead: bool = True


PROVIDERS = {
    "random order, no read-ahead": {"order": "random", "read_ahead": False},
    "random order": {"order": "random"},
    "quasi-random order, no read-ahead": {"order": "quasi_random", "read_ahead": False},
    "quasi-random order, pages dropped": {"order": "quasi_random", "cache": "none"},
}


def measure(job: Job, group: str | None, out: multiprocessing.Queue) -> None:
    """Load for `job.seconds` in the control group; put images per second, or the reason for a failure, into `out`."""
    import torch

    from pipelines.loader import DataConfig, build_loader
    from pipelines.read_ahead import ReadAhead
    from pipelines.views import ViewsConfig

    if not job.read_ahead:
        ReadAhead.begin = lambda self, position: None
    reader = BetonReader(job.beton)
    kind: Any = {"order": job.order, "cache": job.cache, "window_mb": job.window_mb}
    cfg = DataConfig(global_batch_size=job.batch_size, **kind)
    places = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": 1}
    loader = build_loader(reader, cfg, ViewsConfig(recipe="weak"), seed=job.seed, **places)
    next(loader.epoch(0))  # compiles
    reader.file_map.madvise(mmap.MADV_DONTNEED)  # mapped pages would stay cached
    if reason := drop_from_cache(Path(job.beton)):
        out.put(reason)
        return
    if group:
        for thread in os.listdir("/proc/self/task"):
            Path(group, "tasks").write_text(thread)
    start_s, num_images = time.monotonic(), 0
    for batch in loader.epoch(1):
        num_images += len(batch.labels)
        if time.monotonic() - start_s > job.seconds:
            break
    out.put(num_images / (time.monotonic() - start_s))


def main() -> int:
    """Measure, print and record; for bad input, print one line and return 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("beton", type=Path, help="a .beton of photographs, larger than what is read in --seconds")
    parser.add_argument("--reads-per-s", type=int, default=150, help="of the slowed disk (default: 150, a hard disk's)")
    parser.add_argument("--mb-per-s", type=int, default=150, help="of the slowed disk (default: 150)")
    parser.add_argument("--window-mb", type=int, default=128, help="of the quasi-random order (default: 128)")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_RESULTS / "disk.csv")
    args = parser.parse_args()
    try:
        _run(args)
    except (DataError, OSError) as error:
        print(f"bench_disk: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    BetonReader(args.beton)
    environment = environment_columns(_PACKAGES)
    device = os.stat(args.beton).st_dev
    place = f"{os.major(device)}:{os.minor(device) & ~0xF}"  # the disk that contains the partition
    _GROUP.mkdir(exist_ok=True)
    (_GROUP / "blkio.throttle.read_iops_device").write_text(f"{place} {args.reads_per_s}")
    (_GROUP / "blkio.throttle.read_bps_device").write_text(f"{place} {args.mb_per_s * 10**6}")
    given = {"seconds": args.seconds, "batch_size": args.batch_size, "seed": args.seed, "window_mb": args.window_mb}
    job = Job(beton=str(args.beton), **given)
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for repetition in range(args.repetitions):
        for name in list(PROVIDERS)[repetition % len(PROVIDERS) :] + list(PROVIDERS)[: repetition % len(PROVIDERS)]:
            results = context.Queue()
            process = context.Process(target=measure, args=(replace(job, **PROVIDERS[name]), str(_GROUP), results))
            process.start()
            result = results.get(timeout=300)
            process.join()
            if isinstance(result, str):
                raise DataError(f"{args.beton}: {result}")
            found[name].append(result)
    slowest = spread(found["random order, no read-ahead"])["p50"]
    rows = [
        {
            "provider": name,
            **{f"img_per_s_{key}": round(value, 1) for key, value in spread(rates).items()},
            "ratio_to_no_read_ahead": round(spread(rates)["p50"] / slowest, 2),
            "reads_per_s": args.reads_per_s,
            "mb_per_s": args.mb_per_s,
            "window_mb": args.window_mb,
            "file_bytes": args.beton.stat().st_size,
            "window_s": args.seconds,
            "repetitions": args.repetitions,
            "local_batch_size": args.batch_size,
            "seed": args.seed,
        }
        for name, rates in found.items()
    ]
    append_rows(args.out, [row | environment for row in rows])
    print(format_table(rows, list(rows[0])[:7]))


if __name__ == "__main__":
    sys.exit(main())
