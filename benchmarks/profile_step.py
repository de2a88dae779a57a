"""Profile the training step: time on host and device, kernels, launches, copies and synchronisations of each step.

    python benchmarks/profile_step.py --cfg configs/X.yaml --set data.train=X.beton --trace step.json --out step.csv

The trainer is built as in training. The same number of steps is run three times: timed only, with a report of every
operation that makes the host wait for the device, and under torch.profiler. Without a GPU, operators are counted in
place of kernels, and reads of a tensor's value in place of synchronisations; such figures say nothing about a GPU.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.config import Config, load_config
from fastssl.errors import UserError
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table
from fastssl.trainer import start_alone
from pipelines.batch import Batch
from pipelines.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "torchvision", "deepspeed", "ffcv", "numba", "numpy")
# A profile saves nothing and never reaches its last step.
OVERRIDES = ("run.resume=never", "train.num_epochs=1000000", "run.checkpoint_every_epochs=1000000")
OWN_FOLDERS = tuple(str(ROOT / name) for name in ("fastssl", "pipelines", "kernels"))
NOT_A_SOURCE = (__file__, warnings.__file__, "torch/_dynamo/eval_frame.py")  # frames of the profiling itself
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}  # on a GPU, these wait
LAUNCH_NAMES = ("LaunchKernel", "GraphLaunch")
WAIT_NAMES = ("Synchronize", "cudaMemcpy", "cuMemcpy")
SHOWN = ("label", "global_batch_size", "img_per_s", "wall_ms", "host_ms", "device_ms", "kernels", "launches", "memcpys")
SHOWN += ("waits", "host_syncs", "peak_mb")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of steps without a profiler.

    Attributes:
        wall_ms: Wall time of a step, including the work of the device.
        host_ms: Time of a step until the host has queued all its work.
        peak_mb: Peak memory of torch's allocator; None on the CPU.
    """

    wall_ms: float
    host_ms: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The profiler's counts of a step; `device_ms` is the time in which at least one kernel or copy ran."""

    device_ms: float
    kernels: float
    launches: float
    memcpys: float
    waits: float
    top: list[dict[str, Any]]


class Steps:
    """A trainer with an endless iterator of batches."""

    def __init__(self, cfg: Config) -> None:
        self.trainer = start_alone(cfg)
        self.device = self.trainer.device
        self._batches = self._endless()

    def take(self, num: int) -> None:
        """Take steps as in training; return as soon as the host has queued them."""
        self.trainer.fit_batches(islice(self._batches, num))

    def start(self) -> None:
        """Start the timer, as `Trainer.fit` does."""
        self.trainer.epoch_stats.timer.start()

    def close(self) -> None:
        self._batches.close()
        self.trainer.loader.close()
        self.trainer.epoch_stats.close()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _endless(self) -> Generator[Batch, None, None]:
        for epoch in count():
            yield from self.trainer.loader.epoch(epoch)


def time_steps(steps: Steps, num: int) -> Timing:
    is_cuda = steps.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(steps.device)
    steps.synchronize()
    started = time.perf_counter()
    steps.take(num)
    host_s = time.perf_counter() - started
    steps.synchronize()
    wall_s = time.perf_counter() - started
    peak_mb = torch.cuda.max_memory_allocated(steps.device) / 1e6 if is_cuda else None
    return Timing(wall_ms=wall_s / num * 1e3, host_ms=host_s / num * 1e3, peak_mb=peak_mb)


# -- torch.profiler


def profile_steps(steps: Steps, num: int, trace: Path, num_top: int) -> Counts:
    """Take steps under torch.profiler and write its Chrome trace to `trace`."""
    os.environ.setdefault("TEARDOWN_CUPTI", "0")  # else replaying a CUDA graph after CUPTI's teardown has crashed
    activities = [torch.profiler.ProfilerActivity.CPU]
    if steps.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    steps.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        steps.take(num)
        steps.synchronize()
    profiler.export_chrome_trace(str(trace))
    return count_events(json.loads(trace.read_text())["traceEvents"], num, num_top)


def count_events(events: Sequence[dict[str, Any]], num_steps: int, num_top: int) -> Counts:
    """Read a Chrome trace of `num_steps` steps; without kernels, as on the CPU, count operators in their place.

    Times in the trace are in microseconds. Launches and waits are calls of the CUDA runtime or driver; the
    synchronisation at the end of the window is not counted.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "dur" in event:
            found[str(event.get("cat", "")).lower()].append(event)
    on_device = [*found["kernel"], *found["gpu_memcpy"], *found["gpu_memset"]]
    calls = [event["name"] for event in (*found["cuda_runtime"], *found["cuda_driver"])]
    waits = sum(_is_wait(name) for name in calls)
    kernels = found["kernel"] or _outermost(found["cpu_op"])
    time_us: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for event in on_device or kernels:
        time_us[event["name"]] += event["dur"]
        number[event["name"]] += 1
    top = [
        {"name": name[:110], "us_per_step": round(spent / num_steps, 1), "calls_per_step": number[name] / num_steps}
        for name, spent in time_us.most_common(num_top)
    ]
    return Counts(
        device_ms=_busy_us(on_device or kernels) / num_steps / 1e3,
        kernels=len(kernels) / num_steps,
        launches=sum(any(part in name for part in LAUNCH_NAMES) for name in calls) / num_steps,
        memcpys=len(found["gpu_memcpy"]) / num_steps,
        waits=max(0, waits - 1) / num_steps,
        top=top,
    )


def _is_wait(name: str) -> bool:
    return any(part in name for part in WAIT_NAMES) and "Async" not in name


def _outermost(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that are not inside another event of their thread."""
    outermost, ends = [], defaultdict(float)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= ends[event["tid"]]:
            outermost.append(event)
            ends[event["tid"]] = event["ts"] + event["dur"]
    return outermost


def _busy_us(events: Sequence[dict[str, Any]]) -> float:
    """The length of the union of the events' time intervals."""
    busy, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


# -- synchronisations and their source lines


def find_syncs(steps: Steps, num: int) -> Counter[str]:
    """The operations in `num` steps that make the host wait, by the source line of this project."""
    found: Counter[str] = Counter()
    with _cuda_syncs(found) if steps.device.type == "cuda" else _Reads(found):
        steps.take(num)
    return found


@contextlib.contextmanager
def _cuda_syncs(found: Counter[str]) -> Iterator[None]:
    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):  # skip the warning that the mode is a prototype
            found[source_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class _Reads(TorchDispatchMode):
    """Records the operators that read a tensor's value, which would wait on a GPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in READS:
            self._found[source_line()] += 1
        return func(*args, **(kwargs or {}))


def source_line() -> str:
    """The innermost line of this project on the stack, and the function it called, if that is external code."""
    stack = [frame for frame in traceback.extract_stack() if not frame.filename.endswith(NOT_A_SOURCE)]
    for i, frame in reversed(list(enumerate(stack))):
        if frame.filename.startswith(OWN_FOLDERS):
            path = Path(frame.filename).relative_to(ROOT)
            inner = f" ({stack[-1].name} in {Path(stack[-1].filename).name})" if i < len(stack) - 1 else ""
            return f"{path}:{frame.lineno}{inner}"
    return f"{Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack else "backward, or another thread"


# -- the report


def run(args: argparse.Namespace) -> None:
    environment = environment_columns(PACKAGES)  # before the run, to record the commit that is measured
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.cfg, [*args.set, *OVERRIDES, f"run.dir={folder}/run"])
        started = time.perf_counter()
        steps = Steps(cfg)
        steps.start()
        try:
            steps.take(args.num_warmup)
            steps.synchronize()
            start_s = time.perf_counter() - started
            timing = time_steps(steps, args.num_steps)
            syncs = find_syncs(steps, args.num_steps)
            counts = profile_steps(steps, args.num_steps, args.trace or Path(folder) / "trace.json", args.top)
        finally:
            steps.close()
    row = build_row(args, cfg, steps.device, timing, counts, syncs) | {"start_s": round(start_s, 1)}
    print(format_table([row], SHOWN))
    print(format_table(counts.top, ["us_per_step", "calls_per_step", "name"]) if counts.top else "no kernels were seen")
    print(*_sync_lines(syncs, args.num_steps) or ["no synchronisations"], sep="\n")
    if args.out:
        append_rows(args.out, [row | environment])


def build_row(
    args: argparse.Namespace, cfg: Config, device: torch.device, timing: Timing, counts: Counts, syncs: Counter[str]
) -> dict[str, Any]:
    """The CSV row; figures are per step unless named otherwise."""
    is_cuda = device.type == "cuda"
    return {
        "label": args.label or "+".join(path.stem for path in args.cfg),
        "backbone": cfg.model.backbone,
        "loss": cfg.loss.name,
        "size_px": cfg.views.size_px,
        "global_batch_size": cfg.data.global_batch_size,
        "engine": cfg.data.engine,
        "precision": cfg.train.precision,
        "compile": "yes" if cfg.train.compile else "no",
        "cuda_graph": str(getattr(cfg.train, "cuda_graph", "no such key")).lower(),
        "overrides": shlex.join(override for override in args.set if "=/" not in override),
        "device": device.type,
        "num_steps": args.num_steps,
        "img_per_s": round(cfg.data.global_batch_size / timing.wall_ms * 1e3, 1),
        "wall_ms": round(timing.wall_ms, 3),
        "host_ms": round(timing.host_ms, 3),
        "device_ms": round(counts.device_ms, 3) if is_cuda and counts.top else None,
        "operators_ms": None if is_cuda else round(counts.device_ms, 3),
        "kernels": round(counts.kernels, 1),
        "launches": round(counts.launches, 1),
        "memcpys": round(counts.memcpys, 1),
        "waits": round(counts.waits, 2),
        "host_syncs": round(sum(syncs.values()) / args.num_steps, 2),
        "sync_lines": "; ".join(_sync_lines(syncs, args.num_steps)),
        "peak_mb": None if timing.peak_mb is None else round(timing.peak_mb, 1),
        "seed": cfg.run.seed,
    }


def _sync_lines(syncs: Counter[str], num_steps: int) -> list[str]:
    return [f"{number / num_steps:.2f} a step: {where}" for where, number in syncs.most_common()]


def main() -> int:
    """Measure and print.

    Returns:
        Exit code: 0, or 2 for bad input, after printing one line.
    """
    args = _parse()
    try:
        run(args)
    except (UserError, DataError) as error:
        print(f"profile_step: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--cfg", required=True, nargs="+", type=Path, help="YAML file, or files, of a run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--num-warmup", type=int, default=15, help="steps before, which compile and fill queues")
    parser.add_argument("--num-steps", type=int, default=20, help="steps of each of the three windows")
    parser.add_argument("--top", type=int, default=15, help="kernels in the table")
    parser.add_argument("--label", help="first column of the row (default: the config's name)")
    parser.add_argument("--trace", type=Path, metavar="X.json", help="keep the chrome trace")
    parser.add_argument("--out", type=Path, metavar="X.csv", help="file to append the row to")
    args = parser.parse_args()
    if args.num_warmup < 1 or args.num_steps < 1 or args.top < 1:
        parser.error("--num-warmup, --num-steps and --top must be >= 1")
    if args.trace and not args.trace.parent.is_dir():
        parser.error(f"--trace: there is no folder {args.trace.parent}")
    return args


if __name__ == "__main__":
    sys.exit(main())
