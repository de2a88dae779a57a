"""Test and measure a GPU machine with one command: tests, kernels, loader, training step and a short training.

    python benchmarks/gpu_suite.py --minutes 8 --data data --out runs/gpu_suite
    python benchmarks/gpu_suite.py --device cpu --smoke          # every stage tiny, without a GPU: checks the suite

A stage consists of commands that run in separate processes, within a share of the time; time that a stage does not use
goes to the later stages. Logs (OUT/STAGE.log) and rows (OUT/NAME.csv) are written during the run. A stage that fails or
runs out of time does not stop the next one. At the end, even after Ctrl-C or SIGTERM, the suite prints tables and one
line per stage, and draws a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastssl.tracking.result_rows import append_rows, format_table

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ("configs/data/cifar10.yaml", "configs/loss/mio_small.yaml")
TRAIN_FILE, TEST_FILE = "cifar10_train.beton", "cifar10_test.beton"
NUM_IMAGES = {False: 50_000, True: 2_000}  # of the synthetic data set, by --smoke
MINUTES = "{minutes}"  # in a command: its time limit, minus the time to finish work that has begun
END_S = 15.0  # reserved for tables and plot
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 5.0  # from SIGTERM to SIGKILL
MAX_WORKERS = 16  # of pytest: each takes .6 GB of the GPU for its context alone
# Workers fill the cores: torch's threads would only wait for each other, and inductor's own workers import torch again.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# The variants of the training step by batch size, as (compiled, captured in a CUDA graph): each once.
STEPS = {512: ((False, False), (False, True), (True, False)), 128: ((False, False), (False, True), (True, True))}
# A network whose step takes milliseconds on a CPU; fp32, because bf16 is slow on CPUs.
SMOKE_MODEL = (
    "model.backbone=timm/resnet18",
    "model.backbone_kwargs={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}",
    "model.projector_hidden=[32]",
    "views.size_px=16",
    "train.precision=fp32",
    "run.device=cpu",
)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The options of the suite, as the stages use them."""

    device: str
    smoke: bool
    out: Path
    data: Path  # folder
    started: str  # in the name of the training's folder: a second suite in OUT trains from the start

    def python(self, script: str, *arguments: str | Path) -> list[str]:
        return [sys.executable, script, *map(str, arguments)]

    def csv(self, name: str) -> list[str]:
        return ["--out", str(self.out / f"{name}.csv")]

    def overrides(self) -> list[str]:
        """The config overrides of the trainings of the suite."""
        test = self.data / TEST_FILE
        changed = [f"data.train={self.data / TRAIN_FILE}", f"data.test={test if test.exists() else 'null'}"]
        return [*changed, "data.engine=resident", *(SMOKE_MODEL if self.smoke else ())]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process of a stage.

    Attributes:
        name: The name in the log and in the reason for a failure.
        argv: The command, run from the root of the repository.
        must_say: A pattern that its output must match; None: only the exit code counts.
        environment: Variables that it gets in addition to those of this process.
        skipped: The reason why it is skipped; None: it is run.
    """

    name: str
    argv: list[str] = field(default_factory=list)
    must_say: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a stage; `status` is "pass", "fail" or "not reached"."""

    stage: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    reason: str = ""


# -- the stages


def env(suite: Suite) -> list[Command]:
    smoke = ["--smoke"] if suite.smoke else []
    options = ["--device", suite.device, *smoke, *suite.csv("device")]
    return [Command(name="device", argv=suite.python("benchmarks/bench_device.py", *options))]


def tests(suite: Suite) -> list[Command]:
    """The quick `gpu` tests; without a GPU (--smoke), a few other tests, to check that pytest works."""
    num_workers = 1 if suite.smoke else min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    parallel = ["-n", str(num_workers), "--dist", "worksteal"] if num_workers > 1 and _has("xdist") else []
    # pytest-benchmark warns if there are workers, and warnings are errors.
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-q",
        "-rfE",
        "--tb=short",
        "--durations=10",
        *parallel,
    ]
    if not _has("pytest_timeout"):  # pyproject.toml sets its option in strict mode
        pytest += ["-o", "addopts=--import-mode=importlib", "-W", "ignore::pytest.PytestConfigWarning"]
    settings: dict[str, Any] = {"must_say": r"\b[1-9]\d* passed", "environment": ONE_THREAD if parallel else {}}
    if suite.device == "cpu":
        few = ["-m", "not gpu and not slow", "tests/kernels/test_pair_operators.py"]
        return [Command(name="kernels", argv=[*pytest, *few], **settings)]
    pytest += ["-m", "gpu and not slow"]  # the slow tests compile the same paths for other sizes
    in_kernels, elsewhere = gpu_test_files()
    kernels = Command(name="kernels", argv=[*pytest, *in_kernels], **settings)
    absent = [name for name in ("pydantic", "deepspeed") if not _has(name)]
    if absent:
        return [kernels, Command(name="others", skipped=f"{', '.join(absent)} not installed")]
    return [kernels, Command(name="others", argv=[*pytest, *elsewhere], **settings)]


def gpu_test_files() -> tuple[list[str], list[str]]:
    """The files with tests marked `gpu`, in tests/kernels and elsewhere: of a folder, each worker would import all."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    names = sorted(path.relative_to(ROOT).as_posix() for path in found)
    in_kernels = [name for name in names if name.startswith("tests/kernels/")]
    return in_kernels, [name for name in names if name not in in_kernels]


def loss(suite: Suite) -> list[Command]:
    tiny = ["--rows", "512", "--widths", "16", "--losses", "exp", "--seconds", "0.05"]
    tiny += ["--providers", "fastssl chunked", "eager"]
    options = ["--device", suite.device, *(tiny if suite.smoke else ["--minutes", MINUTES]), *suite.csv("loss")]
    return [Command(name="loss", argv=suite.python("benchmarks/bench_loss.py", *options))]


def tiles(suite: Suite) -> list[Command]:
    if suite.device == "cpu" and (reason := why_not_interpreted()):
        return [Command(name="tiles", skipped=reason)]
    smoke = ["--smoke"] if suite.smoke else []
    options = ["--device", suite.device, *smoke, *suite.csv("tiles")]
    return [Command(name="tiles", argv=suite.python("benchmarks/tune_tiles.py", *options))]


def why_not_interpreted() -> str | None:
    """Why Triton's interpreter cannot run the kernels; compiled kernels are not concerned. None: it can."""
    try:
        triton, numpy = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"
    of_triton, of_numpy = ([int(part) for part in version.split(".")[:2]] for version in (triton, numpy))
    if of_triton <= [3, 6] and of_numpy >= [2, 5]:  # it makes numbers of arrays with one element, in loops' ranges
        return f"the interpreter of Triton {triton} fails with NumPy {numpy}"
    return None


def augment(suite: Suite) -> list[Command]:
    tiny = ["--samples", "2", "8", "--repetitions", "2"] if suite.smoke else []
    options = ["--device", suite.device, *tiny, *suite.csv("augment")]
    return [Command(name="augment", argv=suite.python("benchmarks/bench_augment.py", *options))]


def loader(suite: Suite) -> list[Command]:
    """Every engine in alternation, including the synthetic one; an engine that is not installed gives a row."""
    engines = ["resident", "ffcv", "synthetic"] if suite.smoke else ["resident", "ffcv", "dali", "synthetic"]
    tiny = ["--batch-size", "64", "--seconds", "0.2"] if suite.smoke else []
    options = [suite.data / TRAIN_FILE, "--engines", *engines, "--device", suite.device, *tiny, *suite.csv("loader")]
    return [Command(name="loader", argv=suite.python("benchmarks/bench_engines.py", *options))]


def step(suite: Suite) -> list[Command]:
    """Eager and captured in a CUDA graph at two batch sizes, compiled at the large one, both at the small one."""
    has_graph = "cuda_graph" in (ROOT / "fastssl/config.py").read_text()
    commands = []
    for full_batch, variants in STEPS.items():
        batch = full_batch // 8 if suite.smoke else full_batch
        for compiles, captures in variants:
            how = " and ".join(["compiled"] * compiles + ["captured"] * captures) or "eager"
            name = f"{how}, batch {batch}"
            if suite.device == "cpu" and (compiles or captures):
                commands.append(Command(name=name, skipped="compiling takes minutes on a CPU, and there are no graphs"))
                continue
            if captures and not has_graph:
                commands.append(Command(name=name, skipped="there is no train.cuda_graph"))
                continue
            keys = [f"data.global_batch_size={batch}", f"train.compile={str(compiles).lower()}"]
            keys += [f"train.cuda_graph={str(captures).lower()}"] if has_graph else []
            few = ["--num-warmup", "2", "--num-steps", "2"] if suite.smoke else []
            options = ["--cfg", *CONFIG, "--set", *suite.overrides(), *keys, "--label", name, *few, *suite.csv("step")]
            commands.append(Command(name=name, argv=suite.python("benchmarks/profile_step.py", *options)))
    return commands


def train(suite: Suite) -> list[Command]:
    """Three epochs with the command that users call."""
    launcher = shutil.which("deepspeed") if suite.device == "cuda" else None
    start = [launcher, "--num_gpus", "1"] if launcher else [sys.executable]
    keys = ["train.num_epochs=3", f"run.dir={_train_folder(suite)}", "run.resume=never"]
    argv = [*start, "fastssl/train.py", "--cfg", *CONFIG, "--set", *suite.overrides(), *keys]
    return [Command(name="train", argv=argv)]


def synthetic_data(suite: Suite) -> list[Command]:
    argv = suite.python(__file__, "--write-data", suite.data, str(NUM_IMAGES[suite.smoke]))
    return [Command(name="data", argv=argv)]


STAGES: dict[str, Callable[[Suite], list[Command]]] = {
    "env": env,
    "tests": tests,
    "loss": loss,
    "tiles": tiles,
    "augment": augment,
    "loader": loader,
    "step": step,
    "train": train,
}
NEED_DATA = ("loader", "step", "train")
# Shares of the time: seconds on an H200 with 16 cores, in tens: the times of the stages one by one with a margin. Of
# the tests, those of the kernels take 45 s; the others are an estimate. The suite as a whole has not been measured.
SHARES = {"data": 1, "env": 2, "tests": 13, "loss": 8, "tiles": 3, "augment": 2, "loader": 4, "step": 15, "train": 4}


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _train_folder(suite: Suite) -> Path:
    return suite.out / f"train_{suite.started}"


# -- running them


def run_stages(suite: Suite, stages: dict[str, list[Command]], end: float) -> list[Result]:
    """Run each stage within its share of the remaining time; after an interrupt, the rest is "not reached".

    Args:
        suite: Its `out` is the folder of the logs.
        stages: The commands of each stage by name, in order.
        end: The value of `time.monotonic()` at which all stages must have ended.
    """
    results: list[Result] = []
    names = list(stages)
    reason = "no time was left"
    for i, name in enumerate(names):
        started = time.monotonic()
        if end - started < 1:
            break
        share = SHARES.get(name, 1) / sum(SHARES.get(other, 1) for other in names[i:])
        try:
            results.append(run_stage(name, stages[name], suite.out / f"{name}.log", (end - started) * share))
        except KeyboardInterrupt:
            reason = "interrupted"
            results.append(Result(stage=name, status="fail", seconds=time.monotonic() - started, reason=reason))
            break
        print(summary_line(results[-1]), flush=True)
    left = names[len(results) :]
    return results + [Result(stage=name, status="not reached", reason=reason) for name in left]


def run_stage(stage: str, commands: Sequence[Command], log: Path, limit_s: float) -> Result:
    """Run the commands of a stage one after the other; the stage fails if one of them fails."""
    print(f"{stage}: at most {limit_s:.0f} s, {log}", flush=True)
    started = time.monotonic()
    reasons: list[str] = []
    for i, command in enumerate(commands):
        left_s = limit_s - (time.monotonic() - started)
        if command.skipped:
            _say(log, f"{command.name}: skipped: {command.skipped}")
            continue
        if left_s < 1:
            reasons.append(f"{command.name}: no time was left")
            continue
        # A command that hangs must leave time for the later ones: it gets at most twice the average share.
        own_s = min(left_s, 2 * left_s / len(commands[i:]))
        if reason := run_command(command, log, own_s):
            reasons.append(reason if len(commands) == 1 else f"{command.name}: {reason}")
            _say(log, f"{command.name}: failed: {reason}")
    seconds = time.monotonic() - started
    status = "fail" if reasons else "pass"
    return Result(stage=stage, status=status, seconds=seconds, limit_s=limit_s, reason="; ".join(reasons))


def run_command(command: Command, log: Path, limit_s: float) -> str | None:
    """Run a command and append its output to `log`; return the reason for a failure, or None.

    The command leads its own session, so that all its child processes end with it: when it exits, at the limit, or when
    this process is interrupted.
    """
    argv = [part.replace(MINUTES, f"{0.75 * limit_s / 60:.2f}") for part in command.argv]
    environment = os.environ | {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"} | command.environment
    with log.open("ab") as file:
        file.write(f"\n$ {shlex.join(argv)}\n".encode())
        file.flush()
        begin = file.tell()
        try:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_session(process)
    with log.open("rb") as file:
        file.seek(begin)
        output = file.read().decode(errors="replace")
    if code is None:
        return f"stopped at its limit of {limit_s:.0f} s; it last said: {last_error(output)}"
    if code:
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        return f"{how}: {last_error(output)}"
    if command.must_say and not re.search(command.must_say, output):
        return f"its output does not match {command.must_say!r}: {last_error(output)}"
    return None


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it is still running, and all processes it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _say(log: Path, line: str) -> None:
    print(f"  {line}", flush=True)
    with log.open("a") as file:
        file.write(f"{line}\n")


def last_error(output: str) -> str:
    """The last line that names an error; otherwise the last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
    errors = [line for line in lines if re.search(r"\b(\w*Error|\w*Exception|FAILED|error:)", line)]
    return (errors or lines or ["it said nothing"])[-1][:240]


# -- the report

# For each CSV file: the columns that identify a row, and the column of its figure.
FIGURES = {
    "device": (("measured", "unit"), "value"),
    "loss": (("loss", "rows", "width", "provider", "products"), "ms_p50"),
    "tiles": (
        ("case", "tile_rows", "tile_columns", "num_warps", "stages", "programs", "registers"),
        "ms_p50",
    ),
    "augment": (("op", "size_px"), "views_per_s"),
    "loader": (("engine", "batch_size"), "img_per_s_p50"),
    "step": (("label", "wall_ms", "host_ms", "device_ms", "launches", "host_syncs", "peak_mb"), "img_per_s"),
    "train": (("epoch", "loss", "online_top1", "data_wait_fraction"), "img_per_s"),
}


def write_epochs(suite: Suite) -> None:
    """Write the epochs of the training as train.csv, even if the training was stopped."""
    metrics = _train_folder(suite) / "metrics.jsonl"
    if not metrics.exists():
        return
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    names = dict.fromkeys(name for row in epochs for name, value in row.items() if not isinstance(value, list))
    append_rows(suite.out / "train.csv", [{name: row.get(name) for name in names} for row in epochs])


def read_figures(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows with a figure of every existing CSV file, reduced to the columns of FIGURES."""
    found = {}
    for name, (labels, value) in FIGURES.items():
        path = out / f"{name}.csv"
        if not path.exists():
            continue
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get(value)]
        if rows:
            found[name] = [{key: row[key] for key in labels if key in row} | {value: float(row[value])} for row in rows]
    return found


def draw(figures: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot the figures as bars, one panel per file; do nothing if matplotlib is not installed."""
    shown = {name: rows for name, rows in figures.items() if name != "device"}
    if not shown or not _has("matplotlib"):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(1.5, 0.22 * len(rows) + 0.8) for rows in shown.values()]
    figure, axes = pyplot.subplots(
        len(shown), figsize=(9, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[:, 0], shown.items(), strict=True):
        labels, value = FIGURES[name]
        num_labels = 1 if name in ("step", "train") else 6
        names = [" ".join(str(row[key]) for key in labels[:num_labels] if row.get(key)) for row in rows]
        bars = axis.barh(range(len(rows)), [row[value] for row in rows])
        axis.bar_label(bars, [f"{row[value]:,.4g}" for row in rows], padding=3, fontsize=7)
        axis.set_yticks(range(len(rows)), names, fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{name}: {value}", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary_line(result: Result) -> str:
    seconds = f" in {result.seconds:.0f} s" if result.seconds else ""
    return f"{result.stage}: {result.status}{seconds}{f': {result.reason}' if result.reason else ''}"


def report(suite: Suite, results: Sequence[Result]) -> None:
    """Write the tables, the plot, summary.csv and the line of each stage."""
    try:
        write_epochs(suite)
    except (OSError, ValueError) as error:
        print(f"no train.csv: {error}", flush=True)
    figures = read_figures(suite.out)
    for name, rows in figures.items():
        print(f"\n{name}\n{format_table(rows, list(rows[0]))}", flush=True)
    for result in results:
        times = {"seconds": round(result.seconds, 1), "limit_s": round(result.limit_s)}
        append_rows(suite.out / "summary.csv", [vars(result) | times | {"started": suite.started}])
    print("\n" + "\n".join(map(summary_line, results)), flush=True)
    try:
        draw(figures, suite.out / "summary.png")
    except Exception as error:  # the figures are valid without the plot
        print(f"no plot: {type(error).__name__}: {error}", flush=True)


# -- the synthetic data set


def write_data(folder: Path, num_images: int) -> None:
    """Write images of CIFAR-10's size: a blurred pattern for each of ten classes, plus noise."""
    import numpy as np

    from pipelines.beton import BetonWriter

    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    folder.mkdir(parents=True, exist_ok=True)
    for name, num in ((TRAIN_FILE, num_images), (TEST_FILE, num_images // 5)):
        with BetonWriter(folder / name, num, source="synthetic", overwrite=True) as writer:
            for label in rng.integers(0, 10, num):
                noisy = patterns[label] + rng.integers(-40, 41, (32, 32, 3))
                writer.write_raw(noisy.clip(0, 255).astype(np.uint8), label=int(label))
    print(f"{num_images:,} images in {folder}")


# -- the command


def main() -> int:
    """Run the suite.

    Returns:
        Exit code: 0 if every stage passed, 1 if not, 2 for bad input, after printing one line.
    """
    args = _parse()
    if args.write_data:
        write_data(Path(args.write_data[0]), int(args.write_data[1]))
        return 0
    end = time.monotonic() + 60 * args.minutes
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    out = (args.out or Path(f"runs/gpu_suite_{started}")).resolve()
    data = args.data.resolve() if args.data else out / "data"
    suite = Suite(device=args.device, smoke=args.smoke, out=out, data=data, started=started)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_suite: error: --out: {out} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, _interrupt)
    stages = {name: STAGES[name](suite) for name in args.stages}
    if not args.data and any(name in NEED_DATA for name in stages):
        stages = {"data": synthetic_data(suite), **stages}
    results = run_stages(suite, stages, end - min(END_S, 6 * args.minutes))
    _ignore_signals()
    report(suite, results)
    return 0 if all(result.status == "pass" for result in results) else 1


def _ignore_signals() -> None:
    """Ignore signals until the end, so that the results are reported."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, _: object) -> None:
    _ignore_signals()
    raise KeyboardInterrupt(signal.Signals(number).name)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="some of the stages, by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together (default: 8)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="logs, rows and plot (default: runs/gpu_suite_TIME)")
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"holds {TRAIN_FILE} (default: synthetic images)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="every stage tiny; the only way on a CPU")
    parser.add_argument("--write-data", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown or len(set(args.stages)) < len(args.stages):
        parser.error(f"--stages must be of {','.join(STAGES)}, each once, got {','.join(args.stages)}")
    if not args.minutes > 0:
        parser.error("--minutes must be > 0")
    if args.data and not (args.data / TRAIN_FILE).is_file():
        parser.error(f"--data: {args.data} has no {TRAIN_FILE}")
    if args.device == "cpu" and not (args.smoke or args.write_data):
        parser.error("--device cpu needs --smoke: the real sizes take hours without a GPU")
    if args.device == "cuda" and not args.write_data and not _has_gpu():
        parser.error("--device cuda: torch finds no GPU here (--device cpu --smoke tries the suite)")
    return args


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
