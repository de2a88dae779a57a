"""Time and memory of the loss of every objective by batch size: which grow with B and which with B^2.

    python benchmarks/bench_objectives.py --out benchmarks/results/objectives_cpu.csv

Forward and backward pass of each loss on random projections [2, B, D] in fp32 on the CPU.
"""

# B samples with two views, D projection dimension

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fastssl.losses import LOSSES, build_loss  # noqa: E402
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table  # noqa: E402

BATCHES = (1024, 2048, 4096, 8192)
MIN_REPETITIONS = 5
COLUMNS = ("loss", "batch", "width", "ms_p50", "ms_min", "num_repetitions", "peak_mb", "device", "dtype", "seed")


def main() -> None:
    """Print the table; with --out, append its rows to the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="samples B")
    parser.add_argument("--width", type=int, default=128, help="width D")
    parser.add_argument("--seconds", type=float, default=0.5, help="of the repetitions of a cell")
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        name, batch, width = args.peak
        print(own_peak_mb(name, int(batch), int(width)))
        return
    environment = environment_columns(("torch", "numpy"))
    rows = []
    for name in args.losses:
        for batch in args.batches:
            rows.append(measure(name, batch, args.width, args.seconds))
            if args.out:  # after each cell
                append_rows(args.out, [rows[-1] | environment])
    print(format_table(rows, COLUMNS[:7]))


def measure(name: str, batch: int, width: int, seconds: float) -> dict[str, Any]:
    """Measure one loss at one batch size; return one row."""
    loss, z = build_loss(LOSSES[name][0](), width), inputs(batch, width)
    step(name, loss, z)
    times_ms: list[float] = []
    while len(times_ms) < MIN_REPETITIONS or sum(times_ms) < seconds * 1e3:
        started = time.perf_counter()
        step(name, loss, z)
        times_ms.append((time.perf_counter() - started) * 1e3)
    measured = (statistics.median(times_ms), min(times_ms), len(times_ms), peak_mb(name, batch, width))
    rounded = [float(f"{x:.4g}") if isinstance(x, float) else x for x in measured]
    return dict(zip(COLUMNS, (name, batch, width, *rounded, "cpu", "float32", 0), strict=True))


def peak_mb(name: str, batch: int, width: int) -> float:
    """Peak resident memory above the inputs, in a separate process whose malloc returns freed blocks."""
    command = [sys.executable, __file__, "--peak", name, str(batch), str(width)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(found.stderr.strip().rpartition("\n")[2])
    return float(found.stdout)


def own_peak_mb(name: str, batch: int, width: int) -> float:
    """Run by `peak_mb` in the separate process."""
    loss = build_loss(LOSSES[name][0](), width)
    step(name, loss, inputs(64, width))  # libraries allocate memory at their first call
    z = inputs(batch, width)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    step(name, loss, z)
    return (resident_bytes("VmHWM") - before) / 1e6


def inputs(batch: int, width: int) -> torch.Tensor:
    """z and targets of both views, [4, B, D]."""
    return torch.randn(4, batch, width, generator=torch.Generator().manual_seed(0))


def step(name: str, loss: torch.nn.Module, drawn: torch.Tensor) -> None:
    """Run a forward and a backward pass."""
    z = drawn[:2].detach().requires_grad_()
    has_target = hasattr(LOSSES[name][0], "target_momentum")
    loss(*z, **({"targets": list(drawn[2:])} if has_target else {})).backward()


def resident_bytes(field: str) -> int:
    """The current VmRSS, or VmHWM, the maximum since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
