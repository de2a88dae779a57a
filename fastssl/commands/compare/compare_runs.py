"""`fastssl compare`: train and evaluate several configurations with several seeds, and compare the results.

Runs are evaluated on images held out of the training file, so that choices made from the table (a variant of a loss, a
temperature) do not depend on test labels; --on-test uses data.test, for after all choices have been made.

Folders below OUT: CONFIG[/KEY=VALUE of a sweep ...]/seed_S, and CONFIG[/...]/tune/KEY=VALUE of a tuned key.
"""

import itertools
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastssl.checkpoint.save_load import checkpoint_of, step_of
from fastssl.config import differing_keys, load_config, to_dict
from fastssl.errors import ConfigError, UserError
from fastssl.evaluation.accuracy import over_seeds
from fastssl.evaluation.protocols import outcome_names
from fastssl.machine.yaml_text import parse_yaml
from fastssl.tracking.report import Report
from fastssl.tracking.result_rows import append_rows, environment_columns
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.errors import did_you_mean
from pipelines.printable import printable

_TRAIN = Path(__file__).resolve().parents[2] / "train.py"
_ENCODER = "pre-trained encoder"
_PACKAGES = ("torch", "torchvision", "deepspeed", "ffcv", "numpy", "timm", "scikit-learn")
TUNING_SEED = 1000  # no seed of the table, so that a choice is not made on the run that is then reported
SHOWN = {
    "config": "config",
    "metric": "metric",
    "mean_percent": "mean",
    "sd_over_seeds": "sd",
    "interval95_over_seeds": "95% interval",
    "difference_to_best": "to best",
    "difference_se": "± se",
    "num_seeds": "seeds",
}
DETAILS = ("tuned", "interval95_over_seeds", "num_seeds")

Row = dict[str, Any]
Setting = tuple[str, str]  # a dotted key and its value as text


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A configuration at one point of the sweep.

    Attributes:
        config: The YAML file.
        swept: The settings of the sweep.
        tuned: The settings that were chosen for it.
    """

    config: Path
    swept: tuple[Setting, ...] = ()
    tuned: tuple[Setting, ...] = ()

    @property
    def name(self) -> str:
        """Its name in the table."""
        return " ".join([self.config.stem, *(f"{key.rpartition('.')[2]}={value}" for key, value in self.swept)])

    @property
    def folder(self) -> Path:
        """The folder of its runs, below the folder of the comparison."""
        return Path(self.config.stem, *map(_folder_name, self.swept))

    @property
    def overrides(self) -> list[str]:
        """Its settings as `key=value`."""
        return [f"{key}={value}" for key, value in (*self.swept, *self.tuned)]


def compare(
    configs: Sequence[Path],
    out: Path,
    *,
    num_seeds: int,
    base: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    sweep: Sequence[str] = (),
    tune: Sequence[str] = (),
    tune_on: str | None = None,
    on_test: bool = False,
    launcher: str = "",
    num_jobs: int = 1,
    say: Callable[[str], None] = print,
) -> Report:
    """Train every configuration with the seeds 0, 1, ... and evaluate the encoders; complete runs are not repeated.

    Args:
        configs: YAML files; a file's stem is its name in the table.
        out: Folder for the runs, compare.csv and compare.png; with `tune`, tune.csv as well.
        num_seeds: Seeds per configuration, >= 1.
        base: YAML files with what all configurations have in common; each configuration is read after them.
        overrides: `key=value` changes for all configurations.
        sweep: `key=value,value,...`: every configuration is run with each of the values (of several keys: with each
            combination), a row of the table each.
        tune: `key=value,value,...`: for each row of the table, the value (or combination) whose encoder is the best on
            the held-out images is chosen first, with a seed that is not in the table.
        tune_on: The protocol to choose by; None: the first of eval.what.
        on_test: Evaluate on data.test; otherwise on data.holdout_fraction of the training file.
        launcher: Command that starts a training, such as "deepspeed --num_gpus 8"; empty: this Python, one process.
        num_jobs: Runs at the same time, >= 1; with more than one, the output of each goes to RUN.log.
        say: Called with progress messages.

    Returns:
        A table: mean, standard deviation and Student's 95% interval over the seeds of each protocol's top-1, and the
        mean difference to the best configuration over the same seeds with its standard error.

    Raises:
        UserError: a configuration cannot be run, two have one name, or a training failed.
    """
    for name, number in (("--seeds", num_seeds), ("--jobs", num_jobs)):
        if number < 1:
            raise UserError(f"{name} must be >= 1, got {number}")
    points, candidates = _combinations("--sweep", sweep), _combinations("--tune", tune)
    variants = [Variant(config=config, swept=point) for config in configs for point in points]
    protocols = _check(variants, candidates, base, overrides, on_test=on_test)
    tune_on = tune_on or next(iter(protocols), "few_label")
    if tune and tune_on not in protocols:
        hint = did_you_mean(tune_on, protocols)
        raise UserError(f"--tune-on must be one of {', '.join(protocols)} (eval.what), not {tune_on}{hint}")
    environment = environment_columns(_PACKAGES)
    runs = _Runs(out, base, overrides, launcher=launcher, num_jobs=num_jobs, say=say)
    if tune:
        variants = _tuned(variants, candidates, runs, tune_on, environment)
    tasks = [(v, seed, v.folder / f"seed_{seed}") for v in variants for seed in range(num_seeds)]
    judged = runs.all(tasks, on_test=on_test)
    rows = [
        {"config": variant.name, **({"tuned": _text(variant.tuned)} if tune else {}), "seed": seed, **line}
        for (variant, seed, _), lines in zip(tasks, judged, strict=True)
        for line in lines
    ]
    table = _write(out / "compare.csv", rows, environment)
    summary = summarise(rows)
    draw(summary, variants, out / "compare.png")
    scored_on = "the test file" if on_test else "held-out images of the training file"
    files = {"csv": table, "plot": table.with_suffix(".png")} | ({"tune_csv": out / "tune.csv"} if tune else {})
    return Report(
        values={"scored_on": scored_on, "rows": summarise(rows, is_exact=True), "runs": rows, **files},
        rows=summary,
        columns=SHOWN | ({"tuned": "tuned"} if tune else {}),
        details=[name for name in DETAILS if name != "tuned" or tune],
        head=f"top-1 in % on {scored_on}",
        foot=", ".join(map(str, files.values())),
    )


def summarise(rows: Sequence[Row], *, is_exact: bool = False) -> list[Row]:
    """One row per configuration and metric, grouped by metric, best mean first; rounded unless `is_exact`."""
    groups: dict[str, dict[str, dict[int, float]]] = {}
    tuned = {row["config"]: row["tuned"] for row in rows if "tuned" in row}
    for row in rows:
        groups.setdefault(row["metric"], {}).setdefault(row["config"], {})[row["seed"]] = row["percent"]
    found: list[Row] = []
    for metric, configs in groups.items():
        ranked = sorted(configs.items(), key=lambda item: -mean(item[1].values()))
        best = ranked[0][1]
        for config, percents in ranked:
            row = {"config": config, "metric": metric} | over_seeds(list(percents.values()), is_exact=is_exact)
            differences = [percents[seed] - best[seed] for seed in percents] if config != ranked[0][0] else []
            row |= _difference(differences, None if is_exact else 2)
            found.append(row | ({"tuned": tuned[config]} if tuned else {}))
    return found


def _difference(differences: Sequence[float], num_decimals: int | None) -> Row:
    """The mean of paired differences, in percentage points, and its standard error; None where there are too few."""
    num = len(differences)
    found = {
        "difference_to_best": mean(differences) if num else None,
        "difference_se": stdev(differences) / num**0.5 if num > 1 else None,
    }
    if num_decimals is None:
        return found
    return {name: None if value is None else round(value, num_decimals) for name, value in found.items()}


def _combinations(option: str, asked: Sequence[str]) -> list[tuple[Setting, ...]]:
    """All combinations of the values of `key=value,value,...`; one empty combination if nothing is asked for."""
    choices: list[list[Setting]] = []
    for text in asked:
        key, equals, listed = text.partition("=")
        values = parse_yaml(f"[{listed}]", option)
        if not (key and equals and values and len(values) > 1 and None not in values):
            raise UserError(f"{option} takes key=value,value,... with two values or more, not {text!r}")
        choices.append([(key, value if isinstance(value, str) else json.dumps(value)) for value in values])
    return list(itertools.product(*choices))


def _text(settings: Sequence[Setting]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings)


def _folder_name(setting: Setting) -> str:
    return re.sub(r"[^\w.,=+-]", "_", "=".join(setting))


def _check(
    variants: Sequence[Variant],
    candidates: Sequence[tuple[Setting, ...]],
    base: Sequence[Path],
    overrides: Sequence[str],
    *,
    on_test: bool,
) -> list[str]:
    """Check all inputs before the long trainings; return the protocols, which all have, that give one number."""
    folders = [variant.folder for variant in variants]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise UserError(f"two configurations are named {twice}, the name in the table: rename one")
    first: dict[tuple[Setting, ...], tuple[Path, Any]] = {}  # of each point of the sweep
    for variant in variants:
        config = variant.config
        for candidate in candidates:
            cfg = load_config([*base, config], [*overrides, *replace(variant, tuned=candidate).overrides])
        if on_test and not cfg.data.test:
            raise ConfigError(f"{config}: --on-test needs data.test, which is not set")
        if (not on_test or candidates != [()]) and not cfg.data.holdout_fraction:
            raise ConfigError(
                f"{config}: data.holdout_fraction is 0, so no images are held out to evaluate on: raise it, or use "
                "--on-test without --tune"
            )
        other, expected = first.setdefault(variant.swept, (config, to_dict(cfg)))
        different = [key for key in differing_keys(expected, to_dict(cfg)) if key.startswith(("data.", "eval."))]
        if different:
            raise UserError(
                f"{config} and {other} differ in {different[0]}: make it the same, or they cannot be compared"
            )
    return [name for name in cfg.eval.what if name != "few_label"]


class _Runs:
    """Trains and evaluates runs; if one fails, the others are asked to save a checkpoint and end."""

    def __init__(
        self,
        out: Path,
        base: Sequence[Path],
        overrides: Sequence[str],
        *,
        launcher: str,
        num_jobs: int,
        say: Callable[[str], None],
    ) -> None:
        self.out = out
        self._base, self._overrides, self._num_jobs, self._say = base, overrides, num_jobs, say
        self._start = shlex.split(launcher) or [sys.executable]
        self._processes: set[subprocess.Popen] = set()
        self._lock, self._is_ending = threading.Lock(), False

    def all(self, tasks: Sequence[tuple[Variant, int, Path]], *, on_test: bool) -> list[list[Row]]:
        """The results of each (variant, seed, folder below `out`)."""
        with ThreadPoolExecutor(self._num_jobs) as pool:
            futures = [pool.submit(self._one, number, tasks, on_test) for number in range(len(tasks))]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self._lock:
                    self._is_ending = True
                    for process in self._processes:
                        process.terminate()
                raise
        return [future.result() for future in futures]

    def _one(self, number: int, tasks: Sequence[tuple[Variant, int, Path]], on_test: bool) -> list[Row]:
        variant, seed, folder = tasks[number]
        run, log = self.out / folder, None
        self._say(printable(f"{variant.name}, seed {seed}: {number + 1} of {len(tasks)} -> {run}"))
        if self._num_jobs > 1:
            log = run.with_name(f"{run.name}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
        settings = [*self._overrides, *variant.overrides, f"run.seed={seed}", f"run.dir={run}", "run.resume=auto"]
        train = [*self._start, _TRAIN, "--cfg", *self._base, variant.config, "--set", *settings]
        self._call("training", run, train, log)
        if RunFolder(run).preempted.exists():
            raise UserError(f"{run}: a signal ended the training before its last epoch; the same command resumes it")
        lines = _lines(RunFolder(run), on_test=on_test)
        cfg = RunFolder(run).load_config().eval
        if not outcome_names(cfg) <= {line["metric"] for line in lines}:
            judge = ["--what", *cfg.what]  # all of it, however short the training was
            judge += [] if on_test else ["--set", "data.test=null", "eval.baselines=false"]
            self._call("evaluation", run, [sys.executable, "-m", "fastssl.cli", "eval", run, *judge], log)
            lines = _lines(RunFolder(run), on_test=on_test)
        return lines

    def _call(self, what: str, run: Path, arguments: Sequence[str | Path], log: Path | None) -> None:
        with log.open("a") if log else nullcontext() as file:
            with self._lock:
                if self._is_ending:
                    raise UserError(f"{run}: not started, as another run has failed")
                process = subprocess.Popen([*map(str, arguments)], stdout=file, stderr=file)
                self._processes.add(process)
            code = process.wait()
            with self._lock:
                self._processes.discard(process)
        if code:
            where = f"in {log}" if log else "above"
            raise UserError(f"{run}: the {what} ended with exit code {code}; its message is {where}")


def _tuned(
    variants: Sequence[Variant],
    candidates: Sequence[tuple[Setting, ...]],
    runs: _Runs,
    tune_on: str,
    environment: Row,
) -> list[Variant]:
    """The variants with the settings that give the best encoder on the held-out images; the first of equals."""
    tried = [replace(variant, tuned=candidate) for variant in variants for candidate in candidates]
    tasks = [(v, TUNING_SEED, Path(v.folder, "tune", "+".join(map(_folder_name, v.tuned)))) for v in tried]
    judged = runs.all(tasks, on_test=False)
    rows = [
        {"config": variant.name, "tuned": _text(variant.tuned), "seed": TUNING_SEED, **line}
        for variant, lines in zip(tried, judged, strict=True)
        for line in lines
    ]
    _write(runs.out / "tune.csv", rows, environment)
    chosen: dict[Path, tuple[float, Variant]] = {}
    for variant, lines in zip(tried, judged, strict=True):
        percent = next(line["percent"] for line in lines if line["metric"] == tune_on)
        if variant.folder not in chosen or percent > chosen[variant.folder][0]:
            chosen[variant.folder] = percent, variant
    return [variant for _, variant in chosen.values()]


def _write(table: Path, rows: Sequence[Row], environment: Row) -> Path:
    table.unlink(missing_ok=True)
    append_rows(table, [row | environment for row in rows])
    return table


def _lines(folder: RunFolder, *, on_test: bool) -> list[Row]:
    """The results of the last checkpoint's encoder: the last one of each protocol."""
    last_step = step_of(checkpoint_of(folder.checkpoints, None))
    keys = ("encoder", "on", "checkpoint_step", "test", "train", "name", "top1", "scored_on")
    lines = [
        line
        for line in read_rows(folder.evaluations, *keys)
        if (line["encoder"], line["on"], line["checkpoint_step"]) == (_ENCODER, None, last_step)
        and (line["test"]["path"] != line["train"]["path"]) == on_test
    ]
    return [
        {
            "metric": line["name"],
            "percent": 100 * line["top1"],
            "scored_on": line["scored_on"],
            "checkpoint_step": line["checkpoint_step"],
        }
        for line in {line["name"]: line for line in lines}.values()
    ]


def draw(summary: Sequence[Row], variants: Sequence[Variant], path: Path) -> None:
    """Plot means with their standard deviations, one panel per metric; over the values of a sweep over one number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metrics = list(dict.fromkeys(row["metric"] for row in summary))
    swept = _swept_numbers(variants)
    height = 4 if swept else 1.2 + 0.3 * len(variants)
    size = (4.5 * len(metrics), height)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        rows = {row["config"]: row for row in summary[::-1] if row["metric"] == metric}
        means = {name: row["mean_percent"] for name, row in rows.items()}
        spreads = {name: row["sd_over_seeds"] or 0 for name, row in rows.items()}
        axis.set_title(f"{metric}, top-1 in %", fontsize=10)
        axis.grid(alpha=0.3)
        if not swept:
            axis.errorbar(means.values(), range(len(rows)), xerr=[*spreads.values()], fmt="o", capsize=3)
            axis.set_yticks(range(len(rows)), [*rows], parse_math=False)
            continue
        for config in dict.fromkeys(variant.config for variant in variants):
            names = [variant.name for variant in variants if variant.config == config]
            y, errors = [means[name] for name in names], [spreads[name] for name in names]
            axis.errorbar([swept[name] for name in names], y, yerr=errors, fmt="o-", capsize=3, label=config.stem)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(variants[0].swept[0][0])
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _swept_numbers(variants: Sequence[Variant]) -> dict[str, float]:
    """The value of each variant's sweep; empty unless it is over one positive number."""
    try:
        found = {variant.name: float(value) for variant in variants for ((_, value),) in [variant.swept]}
    except ValueError:  # not one setting, or no number
        return {}
    return found if min(found.values()) > 0 else {}
