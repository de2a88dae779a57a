"""Images per second of each loader engine on one .beton file, in alternation: a short `fastssl bench loader`.

    python benchmarks/bench_engines.py cifar10_train.beton --engines resident ffcv --out rows.csv

Source images are counted once, whatever the number of views. An engine that is not installed gives a row that says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastssl.tracking.result_rows import append_rows, environment_columns, format_table, spread
from pipelines.bench.streams import Job, open_engine
from pipelines.bench.windows import Measured, measure_in_turns
from pipelines.beton import BetonReader
from pipelines.engines import EngineName
from pipelines.errors import DataError
from pipelines.views import ViewsConfig

PACKAGES = ("torch", "ffcv", "nvidia-dali-cuda130", "numba", "numpy")
SHOWN = ("engine", "img_per_s_p50", "img_per_s_min", "img_per_s_max", "busy_elsewhere_fraction", "note")


def main() -> int:
    """Measure, print and record.

    Returns:
        Exit code: 0; 1 if no engine could be measured; 2 for bad input, after printing one line.
    """
    args = _parse()
    try:
        return run(args)
    except (DataError, ValueError) as error:
        print(f"bench_engines: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    num_samples = BetonReader(args.beton).num_samples
    if not 1 <= args.batch_size <= num_samples:
        raise ValueError(f"--batch-size must be in 1..{num_samples}, the images of the file, got {args.batch_size}")
    environment = environment_columns(PACKAGES)
    job = Job(
        beton=str(args.beton),
        views=ViewsConfig(recipe=args.recipe, size_px=args.size_px),
        batch_size=args.batch_size,
        num_threads=len(os.sched_getaffinity(0)),
        seed=args.seed,
        device=args.device,
    )
    measured = measure_in_turns(
        {name: partial(open_engine, engine=name) for name in dict.fromkeys(args.engines)},
        job,
        num_repetitions=args.repetitions,
        window_s=args.seconds,
        say=lambda message: print(message, file=sys.stderr, flush=True),
    )
    fixed = {"recipe": args.recipe, "size_px": args.size_px, "batch_size": args.batch_size, "device": args.device}
    fixed |= {"num_threads": job.num_threads, "window_s": args.seconds, "seed": args.seed}
    rows = [{"engine": name, **figures(found), **fixed} for name, found in measured.items()]
    print(format_table(rows, SHOWN))
    if args.out:
        append_rows(args.out, [row | environment for row in rows])
    return 0 if any(row["img_per_s_p50"] for row in rows) else 1


def figures(measured: Measured) -> dict[str, Any]:
    """Median, minimum and maximum of the windows, or the reason why there are none."""
    names = [f"img_per_s_{key}" for key in ("p50", "min", "max")]
    if measured.reason is not None:
        empty = dict.fromkeys([*names, "busy_elsewhere_fraction"])
        return empty | {"repetitions": 0, "note": f"not measured: {' '.join(measured.reason.split())}"}
    speeds = spread([window.img_per_s for window in measured.windows])
    busy = spread([window.busy_elsewhere_fraction for window in measured.windows])["p50"]
    rounded = {f"img_per_s_{key}": round(value, 1) for key, value in speeds.items()}
    return rounded | {"busy_elsewhere_fraction": round(busy, 3), "repetitions": len(measured.windows), "note": ""}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("beton", type=Path, metavar="X.beton")
    parser.add_argument("--engines", nargs="+", choices=get_args(EngineName), default=["resident", "ffcv", "synthetic"])
    parser.add_argument("--recipe", default="mio_small", help="a recipe's name (default: mio_small)")
    parser.add_argument("--size-px", type=int, default=32, help="side of every view (default: 32)")
    parser.add_argument("--batch-size", type=int, default=512, help="images (default: 512)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the batches go")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window (default: 1)")
    parser.add_argument("--repetitions", type=int, default=3, help="windows of each (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="X.csv", help="file to append the rows to")
    args = parser.parse_args()
    if args.seconds <= 0 or args.repetitions < 1:
        parser.error("--seconds must be > 0 and --repetitions >= 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
