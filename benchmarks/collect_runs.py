"""Finished runs as rows of a CSV file, and their online accuracy as a curve: what was reached, with what, how often.

    python benchmarks/collect_runs.py runs/X_seed0 runs/X_seed1 --out benchmarks/results/X.csv

Everything is read from the run folders, which `fastssl eval` has judged; the curve lies beside the file, as X.png.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script, Python puts benchmarks/ first on the path: the packages lie beside it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.record import Row, append_rows, command_line, format_table
from fastssl.metrics import read_rows
from fastssl.run_folder import RunFolder

PACKAGES = ("torch", "deepspeed", "ffcv", "numba", "scikit-learn")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the rows and the curve; print the accuracies over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="X.csv")
    arguments = parser.parse_args(argv)
    folders = [RunFolder(path) for path in arguments.runs]
    try:
        rows = [row for folder in folders for row in rows_of(folder)]
        append_rows(arguments.out, rows)
        draw_curve(folders, arguments.out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        sys.exit(f"collect_runs: error: {error}")
    print(format_table(summary(rows), ("row", "metric", "mean_percent", "sd_over_seeds", "num_seeds")))


def rows_of(folder: RunFolder) -> Iterator[Row]:
    """One row for each encoder and metric of the run's eval.json.

    Raises:
        FileNotFoundError: the run was not judged yet.
    """
    cfg = folder.load_config()
    if not folder.evaluation.exists():
        raise FileNotFoundError(f"{folder.path} has no eval.json: run `fastssl eval {folder.path}` first")
    environment = json.loads(folder.environment.read_text())
    judged = json.loads(folder.evaluation.read_text())
    packages = {name.replace("-", "_"): environment["packages"][name] for name in PACKAGES}
    for encoder, result in judged["results"].items():
        for metric, (fraction, sd) in accuracies(result).items():
            yield {
                "row": encoder,
                "metric": metric,
                "percent": f"{100 * fraction:.2f}",
                "sd_over_draws": None if sd is None else f"{100 * sd:.2f}",
                "num_draws": 1 if sd is None else cfg.eval.num_draws,
                "scored_on": judged["scored_on"],
                "checkpoint_step": judged["checkpoint_step"],
                "seed": cfg.run.seed,
                "command": command_line(environment["command"][1:]),
                "world_size": environment["world_size"],
                "cpu": environment["cpu"],
                "num_cpus": environment["num_cpus"],
                "gpus": "; ".join(environment["gpus"]),
                "python": environment["python"],
                **packages,
                "commit": environment["commit"],
                "time_utc": environment["time_utc"],
            }


def accuracies(result: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Top-1 fraction of one encoder, and its deviation over the draws of labels, by the name of the protocol."""
    named: dict[str, tuple[float, float | None]] = {
        f"knn_k{result['knn']['k']}_top1": (result["knn"]["top1"], None),
        "logistic_top1": (result["logistic"]["top1"], None),
    }
    for num_labels, few in result["few_label"].items():
        for classifier in ("logistic", "nearest"):
            name = f"{classifier}_top1_{num_labels}_labels_per_class"
            named[name] = few[f"{classifier}_mean"], few[f"{classifier}_sd"]
    return named


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean and standard deviation over the seeds; the deviation of one seed is None."""
    groups: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        groups.setdefault((row["row"], row["metric"]), []).append(float(str(row["percent"])))
    return [
        {
            "row": encoder,
            "metric": metric,
            "mean_percent": round(statistics.mean(values), 2),
            "sd_over_seeds": round(statistics.stdev(values), 2) if len(values) > 1 else None,
            "num_seeds": len(values),
        }
        for (encoder, metric), values in groups.items()
    ]


def draw_curve(folders: Sequence[RunFolder], path: Path) -> None:
    """The online probe's held-out accuracy and the loss against the epoch, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for folder in folders:
        rows = [row for row in read_rows(folder.metrics) if row.get("kind") == "epoch"]
        label = f"{folder.path.name}, seed {folder.load_config().run.seed}"
        for axis, key, scale in ((axes[0], "online_top1", 100), (axes[1], "loss", 1)):
            points = [(row["epoch"] + 1, scale * row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
    for axis, title in zip(axes, ("online linear probe, top-1 in % on held-out images", "loss"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epochs")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
