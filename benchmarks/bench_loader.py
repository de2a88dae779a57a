"""Loading throughput of our loader and its peers, in one run on one machine: source images/s, two views of each.

Every provider (benchmarks/loader_providers.py) runs in its own process; all are pinned to the same cores. The parent
process requests one timing window from each in turn, for several rounds, so that noise on the machine affects all of
them alike.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.loader_providers import FULL_RECIPE, PLAIN_OPERATIONS, PROVIDERS
from fastssl.tracking.result_rows import Value, append_rows, environment_columns, format_table, spread
from pipelines.bench.stages import measure_stages
from pipelines.bench.streams import Job
from pipelines.bench.windows import Measured, measure_in_turns
from pipelines.beton import BetonReader
from pipelines.errors import DataError
from pipelines.views import ViewsConfig

Row = dict[str, Value]

_RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("torch", "torchvision", "ffcv", "numba", "numpy", "pillow")
_MAX_BUSY_ELSEWHERE = 0.1  # above this, ratios are not meaningful
# Columns of the file that the table does not show.
_HIDDEN = ("recipe", "num_threads", "local_batch_size", "repetitions", "window_s", "seed")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A required minimum ratio of a provider to the fastest of its peers."""

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
    targets: tuple[Target, ...]


# Both use torchvision's own operations; Pillow's approximate blur is not one of them.
_TORCHVISION = ("torchvision_pil", "torchvision_tensor")
DEFAULT_PROVIDERS = ("ours", "ours_plain", "stock_ffcv", *_TORCHVISION, "torchvision_pil_pillow_blur")
DEFAULT_PROVIDERS += ("decode", "synthetic")  # the others are non-default engines or need more packages
_STOCK_TARGET = Target(name="like for like beside stock FFCV", provider="ours_plain", peers=("stock_ffcv",), least=1.5)
WORKLOADS = (
    Workload(
        name="photographs",
        recipe="byol",
        batch_size=64,
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
        targets=(
            Target(name="beside torchvision", provider="ours", peers=_TORCHVISION, least=10, goal=20),
            _STOCK_TARGET,
        ),
    ),
)


def compare(workload: Workload, job: Job, args: argparse.Namespace) -> dict[str, Row]:
    """Measure the providers of one workload in alternation; return one row per provider."""
    names = args.providers
    streams = {name: PROVIDERS[name].open for name in names}
    measured = measure_in_turns(
        streams,
        job,
        num_repetitions=args.repetitions,
        window_s=args.seconds,
        say=lambda message: _say(f"{workload.name}: {message}"),
    )
    found = {name: each for name, each in measured.items() if each.reason is None}
    middle = {name: spread([w.img_per_s for w in each.windows])["p50"] for name, each in found.items()}
    own = {
        "recipe": job.views.recipe,
        "num_threads": job.num_threads,
        "local_batch_size": job.batch_size,
        "window_s": args.seconds,
        "seed": job.seed,
    }
    return {name: {"workload": workload.name, **_figures(name, measured[name], middle), **own} for name in names}


def _figures(name: str, measured: Measured, middle: Mapping[str, float]) -> Row:
    """The results of one provider; `middle` has the medians of all measured providers."""
    provider, windows, reason = PROVIDERS[name], measured.windows, measured.reason
    full = provider.operations == FULL_RECIPE or provider.operations.startswith(f"{FULL_RECIPE}, ")
    plain = provider.operations == PLAIN_OPERATIONS
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
    """Ratio of medians to the fastest of the peers; None if one side was not measured."""
    found = [middle[peer] for peer in peers if peer in middle]
    return round(middle[name] / max(found), 3) if found and name in middle else None


def verdicts(workload: Workload, rows: Mapping[str, Row]) -> Iterator[str]:
    """One line per target, from the rows by provider; no verdict if other programs took much of the cores' time."""
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
    """CPU time of our loader and of each of its stages alone, on one core, in alternation; one row per stage."""
    stages_s = measure_stages(job, num_repetitions=args.repetitions)
    return [
        {
            "workload": workload.name,
            "stage": stage,
            "cpu_us_per_image_min": round(1e6 * seconds, 1),
            "share_of_loader": round(seconds / stages_s["loader"], 3),
            "recipe": job.views.recipe,
            "num_threads": 1,
            "local_batch_size": job.batch_size,
            "repetitions": args.repetitions,
            "seed": job.seed,
        }
        for stage, seconds in stages_s.items()
    ]


def draw_plot(path: Path) -> Path:
    """Plot the CSV file of a comparison as bars: one panel per workload, one bar per provider.

    Returns:
        The path of the PNG, which has the name of the CSV file.
    Raises:
        ValueError: If the file does not exist or has no rows of a comparison.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("img_per_s_p50")]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    if not workloads:
        raise ValueError(f"{path}: no rows of a comparison to draw")
    figure, panels = plt.subplots(1, len(workloads), figsize=(6.2 * len(workloads), 4), layout="constrained")
    for panel, workload in zip([panels] if len(workloads) == 1 else panels, workloads, strict=True):
        shown = sorted(
            (row for row in rows if row["workload"] == workload), key=lambda row: float(row["img_per_s_p50"])
        )
        middle = [float(row["img_per_s_p50"]) for row in shown]
        ends = [
            [abs(float(row[f"img_per_s_{end}"]) - at) for row, at in zip(shown, middle, strict=True)]
            for end in ("min", "max")
        ]
        colours = ["C0" if row["provider"].startswith("fastssl") else "0.65" for row in shown]
        bars = panel.barh(
            [f"{row['provider']}\n{row['operations']}" for row in shown], middle, xerr=ends, color=colours
        )
        panel.bar_label(bars, [f"{value:,.0f}" for value in middle], padding=4, fontsize=8)
        panel.set_xscale("log")
        panel.set_xlim(min(middle) / 2, max(middle) * 3)
        panel.tick_params(axis="y", labelsize=7)
        panel.set_title(f"{workload}: {shown[0]['recipe']}, {shown[0]['num_threads']} cores", fontsize=10)
        panel.set_xlabel("source images a second, two views each (median, least and most)", fontsize=8)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


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
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(DEFAULT_PROVIDERS))
    parser.add_argument("--profile", action="store_true", help="CPU time of our stages instead of the comparison")
    parser.add_argument("--plot", type=Path, metavar="X.csv", help="measure nothing: draw the file's rows as X.png")
    parser.add_argument("--out", type=Path, help="CSV to append to (default: benchmarks/results/loader*.csv)")
    args = parser.parse_args(argv)
    if not args.photographs and not args.cifar10 and not args.plot:
        parser.error("give --photographs or --cifar10, or both; or --plot")
    if not 1 <= args.threads <= num_cores:
        parser.error(f"--threads must be in 1..{num_cores}, the cores of this process, got {args.threads}")
    if args.seconds <= 0 or args.repetitions < 1:
        parser.error("--seconds must be > 0 and --repetitions >= 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print and record.

    Returns:
        Exit code: 0, even if a target is missed; 2 for bad input, after printing one line.
    """
    args = _parse(argv)
    try:
        if args.plot:
            print(draw_plot(args.plot))
        else:
            _run(args)
    except (DataError, ValueError) as error:
        _say(f"bench_loader: error: {' '.join(str(error).split())}")
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    betons = {workload: path for workload in WORKLOADS if (path := getattr(args, workload.name))}
    for path in betons.values():
        BetonReader(path)  # detect a bad file before the first measurement
    packages = dict.fromkeys(PROVIDERS[name].package for name in args.providers)
    environment = environment_columns(
        [*_PACKAGES, *filter(None, packages)]
    )  # before the run, to record the commit that is measured
    out = args.out or _RESULTS / ("loader_profile.csv" if args.profile else "loader.csv")
    for workload, beton in betons.items():
        job = Job(
            beton=str(beton),
            views=ViewsConfig(recipe=workload.recipe),
            batch_size=workload.batch_size,
            num_threads=args.threads,
            seed=args.seed,
        )
        compared = {} if args.profile else compare(workload, job, args)
        rows = profile(workload, job, args) if args.profile else list(compared.values())
        append_rows(out, [row | environment for row in rows])  # now, so that an interrupted run keeps its rows
        print(format_table(rows, [name for name in rows[0] if name not in _HIDDEN]))
        if compared:
            print(*verdicts(workload, compared), sep="\n")
        print(flush=True)
    print(f"{environment['cpu']}, {1 if args.profile else args.threads} cores; rows appended to {out}")


if __name__ == "__main__":
    sys.exit(main())
