"""`fastssl compare`: train and evaluate several configurations with several seeds, and compare the results.

Runs are evaluated on images held out of the training file, so that choices made from the table (a variant of a loss, a
temperature) do not depend on test labels; --on-test uses data.test, for after all choices have been made.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastssl.checkpoint.save_load import checkpoint_of, step_of
from fastssl.commands.evaluate import evaluate_run
from fastssl.config import differing_keys, load_config, to_dict
from fastssl.errors import ConfigError, UserError
from fastssl.evaluation.accuracy import over_seeds
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows

_TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_ENCODER = "pre-trained encoder"
_PACKAGES = ("torch", "torchvision", "deepspeed", "ffcv", "numpy", "timm", "scikit-learn")
SHOWN = ("config", "metric", "mean_percent", "sd_over_seeds", "interval95_over_seeds", "num_seeds")

Row = dict[str, Any]


def compare(
    configs: Sequence[Path],
    out: Path,
    *,
    num_seeds: int,
    base: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    on_test: bool = False,
    launcher: str = "",
    say: Callable[[str], None] = print,
) -> str:
    """Train every configuration with the seeds 0, 1, ... and evaluate the encoders; complete runs are not repeated.

    Args:
        configs: YAML files; a file's stem is its name in the table.
        out: Folder for the runs (NAME/seed_S), compare.csv and compare.png.
        num_seeds: Seeds per configuration, >= 1.
        base: YAML files with what all configurations have in common; each configuration is read after them.
        overrides: `key=value` changes for all configurations.
        on_test: Evaluate on data.test; otherwise on data.holdout_fraction of the training file.
        launcher: Command that starts a training, such as "deepspeed --num_gpus 8"; empty: this Python, one process.
        say: Called with progress messages.

    Returns:
        The table: mean, standard deviation and Student's 95% interval over the seeds of each protocol's top-1.

    Raises:
        UserError: a configuration cannot be run, two have one name, or a training failed.
    """
    _check(configs, base, overrides, num_seeds, on_test=on_test)
    environment = environment_columns(_PACKAGES)
    rows: list[Row] = []
    for number, config in enumerate(configs):
        for seed in range(num_seeds):
            run = out / config.stem / f"seed_{seed}"
            say(f"{config.stem}, seed {seed}: {number * num_seeds + seed + 1} of {len(configs) * num_seeds} -> {run}")
            _train([*base, config], run, [*overrides, f"run.seed={seed}"], launcher)
            rows += _judged(config.stem, run, seed, on_test=on_test)
    table = out / "compare.csv"
    table.unlink(missing_ok=True)
    append_rows(table, [row | environment for row in rows])
    summary = summarise(rows)
    draw(summary, out / "compare.png")
    scored_on = "the test file" if on_test else "images held out of the training file"
    return f"top-1 in % on {scored_on}\n{format_table(summary, SHOWN)}\n{table}, {table.with_suffix('.png')}"


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row per configuration and metric, grouped by metric, best mean first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["metric"], row["config"]), []).append(row["percent"])
    found = [{"config": config, "metric": metric} | over_seeds(values) for (metric, config), values in groups.items()]
    order = list(dict.fromkeys(row["metric"] for row in found))
    return sorted(found, key=lambda row: (order.index(row["metric"]), -row["mean_percent"]))


def draw(summary: Sequence[Row], path: Path) -> None:
    """Plot means with their standard deviations, one panel per metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = list(dict.fromkeys(row["metric"] for row in summary))
    num_configs = len({row["config"] for row in summary})
    size = (4.5 * len(metrics), 1.2 + 0.3 * num_configs)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        rows = [row for row in summary if row["metric"] == metric][::-1]
        means, spreads = [row["mean_percent"] for row in rows], [row["sd_over_seeds"] or 0 for row in rows]
        axis.errorbar(means, range(len(rows)), xerr=spreads, fmt="o", capsize=3)
        axis.set_yticks(range(len(rows)), [row["config"] for row in rows], parse_math=False)
        axis.set_title(f"{metric}, top-1 in %", fontsize=10)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _check(
    configs: Sequence[Path], base: Sequence[Path], overrides: Sequence[str], num_seeds: int, *, on_test: bool
) -> None:
    """Check all inputs before the long trainings."""
    if num_seeds < 1:
        raise UserError(f"--seeds must be >= 1, got {num_seeds}")
    names = [config.stem for config in configs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two configurations are named {twice}: rename one")
    trees = []
    for config in configs:
        cfg = load_config([*base, config], overrides)
        if on_test and not cfg.data.test:
            raise ConfigError(f"{config}: data.test is not set, and --on-test reads it")
        if not on_test and not cfg.data.holdout_fraction:
            raise ConfigError(f"{config}: data.holdout_fraction is 0, so there is nothing to judge on but --on-test")
        trees.append(to_dict(cfg))
    for config, tree in zip(configs[1:], trees[1:], strict=True):
        different = [key for key in differing_keys(trees[0], tree) if key.startswith(("data.", "eval."))]
        if different:
            raise UserError(f"{config} and {configs[0]} differ in {different[0]}: they would not be comparable")


def _train(config: Sequence[Path], run: Path, overrides: Sequence[str], launcher: str) -> None:
    start = shlex.split(launcher) or [sys.executable]
    settings = [*overrides, f"run.dir={run}", "run.resume=auto"]
    done = subprocess.run([*start, str(_TRAIN), "--cfg", *map(str, config), "--set", *settings], check=False)
    if done.returncode:
        raise UserError(f"{run}: the training ended with exit code {done.returncode}; its message is above")
    if RunFolder(run).preempted.exists():
        raise UserError(f"{run}: a signal ended the training before its last epoch; the same command goes on with it")


def _judged(name: str, run: Path, seed: int, *, on_test: bool) -> list[Row]:
    """One row per protocol; the run is evaluated if it has not been already."""
    folder = RunFolder(run)
    if not (lines := _lines(folder, on_test=on_test)):
        evaluate_run(run, [] if on_test else ["data.test=null", "eval.baselines=false"])
        lines = _lines(folder, on_test=on_test)
    return [
        {
            "config": name,
            "seed": seed,
            "metric": line["name"],
            "percent": 100 * line["top1"],
            "scored_on": line["scored_on"],
            "checkpoint_step": line["checkpoint_step"],
        }
        for line in lines
    ]


def _lines(folder: RunFolder, *, on_test: bool) -> list[dict[str, Any]]:
    """The results of the last checkpoint's encoder, the last line of each protocol."""
    last_step = step_of(checkpoint_of(folder.checkpoints, None))
    lines = [
        line
        for line in read_rows(folder.evaluations)
        if (line["encoder"], line["on"], line["checkpoint_step"]) == (_ENCODER, None, last_step)
        and (line["test"]["path"] != line["train"]["path"]) == on_test
    ]
    return list({line["name"]: line for line in lines}.values())
