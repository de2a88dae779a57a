"""Write finished runs as rows of a CSV file (results, settings, number of seeds) and plot their online accuracy.

    python benchmarks/collect_runs.py runs/X_seed0 runs/X_seed1 --out benchmarks/results/X.csv

Everything is read from run folders that `fastssl eval` has evaluated. The plot is saved next to the CSV file, as X.png.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastssl.evaluation.accuracy import over_seeds
from fastssl.tracking.result_rows import Row, append_rows, command_line, format_table
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows

SUMMARY = ("row", "metric", "mean_percent", "sd_over_seeds", "interval95_over_seeds", "num_seeds")
PACKAGES = ("torch", "deepspeed", "ffcv", "numba", "scikit-learn")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the rows and the plot; print the accuracies over the seeds."""
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
    print(format_table(summary(rows), SUMMARY))


def rows_of(folder: RunFolder) -> Iterator[Row]:
    """One row for each encoder and metric of the latest evaluation of the run, at its last evaluated checkpoint.

    Evaluations on another data set (`--on`) are left out.

    Raises:
        FileNotFoundError: If the run has not been evaluated yet.
    """
    cfg = folder.load_config()
    judged = [line for line in read_rows(folder.evaluations) if line["on"] is None]
    if not judged:
        raise FileNotFoundError(f"{folder.path} has no eval.jsonl: run `fastssl eval {folder.path}` first")
    last_step = max(line["checkpoint_step"] for line in judged)
    last = {(line["encoder"], line["name"]): line for line in judged if line["checkpoint_step"] == last_step}
    environment = json.loads(folder.environment.read_text())
    packages = {name.replace("-", "_"): environment["packages"][name] for name in PACKAGES}
    for line in last.values():
        yield {
            "row": line["encoder"],
            "metric": metric_of(line),
            "percent": f"{100 * line['top1']:.2f}",
            "sd_over_draws": None if line["top1_sd"] is None else f"{100 * line['top1_sd']:.2f}",
            "num_draws": len(line["top1_each"]),
            "scored_on": line["scored_on"],
            "checkpoint_step": line["checkpoint_step"],
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


def metric_of(line: Mapping[str, Any]) -> str:
    """The name of a metric, such as knn_k200_top1, logistic_top1 or nearest_top1_5_labels_per_class."""
    if line["protocol"] == "knn":
        return f"knn_k{line['chosen']['k']}_top1"
    if line["protocol"] == "few_label":
        return f"{line['chosen']['classifier']}_top1_{line['chosen']['labels_per_class']}_labels_per_class"
    return f"{line['name']}_top1"


def summary(rows: Sequence[Row]) -> list[Row]:
    """Mean, standard deviation and Student's 95% interval over the seeds; with one seed, the last two are None."""
    groups: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        groups.setdefault((row["row"], row["metric"]), []).append(float(str(row["percent"])))
    return [{"row": encoder, "metric": metric} | over_seeds(values) for (encoder, metric), values in groups.items()]


def draw_curve(folders: Sequence[RunFolder], path: Path) -> None:
    """Plot the held-out accuracy of the online probe and the loss over the epochs, one line per run."""
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
