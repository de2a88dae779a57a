"""Losses over all pairs of a large batch: time, memory and gradient error of ours and of their usual forms.

    python benchmarks/bench_loss.py                      # a short table on the available device: minutes
    python benchmarks/bench_loss.py --all                # more rows and widths: an hour
    python benchmarks/bench_loss.py --device cpu --rows 8192 --widths 128 --out benchmarks/results/loss_cpu.csv

Forward and backward pass of one loss on random z. The providers of a cell are measured in alternation in the same run.
A cell that cannot be run gives a row with the reason. Rows are written as soon as their cell is finished. On a GPU,
`ms` is the device time from its events; `host_ms`, the time of the launches, is the limit for small n.
"""

# n rows, D width. Value and gradient of a one-pass loss take at least 4 n^2 D operations (two matrix products), and
# 6 n^2 D with a second pass over the pairs (nt_xent). `siglip` has (n/2)^2 pairs and three products: 6 (n/2)^2 D.

import argparse
import gc
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from loss_providers import LOSSES, PRODUCTS, PROVIDERS, LossOf, NotInstalledError, build  # noqa: E402

from benchmarks.timing import CallTime, time_call  # noqa: E402
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table  # noqa: E402

PACKAGES = ("torch", "triton", "numpy", "lightly", "siglip_kernel")
ROWS = {"cpu": [8192], "cuda": [65536, 8192]}
WIDTHS = {"cpu": [128], "cuda": [128]}
ALL_ROWS = {"cpu": [1024, 8192], "cuda": [4096, 16384, 65536, 262144]}
ALL_WIDTHS = {"cpu": [64, 128, 256], "cuda": [64, 128, 256, 768]}
TABLE_SECONDS = 160.0  # for the short table on a GPU, where each compilation takes seconds
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
MAX_EXACT_ROWS = {"cpu": 8192, "cuda": 65536}  # above, the fp64 gradient would dominate the run time
SECONDS = {"cpu": 4.0, "cuda": 0.3}  # for the repetitions of one provider in one cell
COLUMNS = ("loss", "provider", "products", "rows", "width", "ms_p20", "ms_p50", "ms_p80", "host_ms_p50")
COLUMNS += ("num_repetitions", "peak_mb")
COLUMNS += ("tflop_per_s", "gb_per_s", "gradient_error", "note")
SHOWN = ("loss", "rows", "width", "provider", "products", "ms_p50", "host_ms_p50", "peak_mb", "tflop_per_s")
SHOWN += ("gradient_error", "note")
AXIS_LABELS = ("ms, forward + backward", "peak MB above inputs")
OPERATIONS = {"softplus": 4, "exp": 4, "nt_xent": 6, "siglip": 6 / 4}  # times n^2 D


def main() -> None:
    args = _parse()
    device = args.device
    environment = environment_columns(PACKAGES)
    constant = {"device": device, "dtype": str(DTYPES[device]).removeprefix("torch."), "seed": 0}
    rows = [row | constant for row in ceilings(device)]
    write(args.out, rows, environment)
    all_rows, all_widths = (ALL_ROWS, ALL_WIDTHS) if args.all else (ROWS, WIDTHS)
    for num_rows, width in product(args.rows or all_rows[device], args.widths or all_widths[device]):
        for loss in args.losses:
            cell = [row | constant for row in measure_cell(args, loss, num_rows, width, device)]
            print(format_table(cell, SHOWN), flush=True)
            write(args.out, cell, environment)
            rows += cell
    if args.out:
        plot(rows, args.out.with_suffix(".png"))


def write(path: Path | None, rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    if path:
        append_rows(path, [row | environment for row in rows])


def _row(values: dict[str, Any]) -> dict[str, Any]:
    """All columns, with floats rounded to four digits."""
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    return dict.fromkeys(COLUMNS) | rounded


# -- one cell


def measure_cell(args: argparse.Namespace, loss: str, num_rows: int, width: int, device: str) -> list[dict[str, Any]]:
    """One row per provider, for n = num_rows rows of the given width."""
    torch._dynamo.reset()  # do not reuse code compiled for the shape of another cell
    cell = {"loss": loss, "rows": num_rows, "width": width}
    z = _inputs(num_rows, width, device)
    exact = exact_gradient(loss, z) if num_rows <= MAX_EXACT_ROWS[device] else None
    ready: dict[str, LossOf] = {}
    rows: dict[str, dict[str, Any]] = {}
    for provider in args.providers:
        rows[provider] = cell | {"provider": provider, "products": PRODUCTS[provider]}
        try:
            if time.perf_counter() > args.deadline_s:
                raise NotInTimeError("the table's time is over; --minutes gives it more")
            loss_of = build(provider, loss, device=device)
            error, peak_bytes = gradient_error(loss_of, z, exact), peak_memory(provider, loss, z)
            rows[provider] |= {"gradient_error": error, "peak_mb": peak_bytes / 1e6}
            ready[provider] = loss_of
        except Exception as error:  # whatever the error, the results of the other providers are valid
            rows[provider] |= {"note": not_measured(error)}
        _free()
    times, notes = measure_times(ready, z, args.seconds or SECONDS[device])
    for provider, note in notes.items():
        rows[provider] |= {"note": note}
    for provider, times_ms in times.items():
        p20, p50, p80 = quantiles([each.ms for each in times_ms])
        tflop = OPERATIONS[loss] * num_rows**2 * width / 1e12
        rows[provider] |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "num_repetitions": len(times_ms)}
        rows[provider] |= {"host_ms_p50": statistics.median(each.host_ms for each in times_ms)}
        rows[provider] |= {"tflop_per_s": tflop / p50 * 1e3}
    return [_row(row) for row in rows.values()]


class NotInTimeError(Exception):
    """The time limit of the table is reached."""


def not_measured(error: Exception) -> str:
    """The note for a provider that could not be run: the first line of the reason."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "not measured: out of memory"
    first_line = next(iter(str(error).splitlines()), "")
    says_all = isinstance(error, (NotInstalledError, NotInTimeError))
    named = first_line if says_all else f"{type(error).__name__}: {first_line}"
    return f"not measured: {named[:200]}"


def _inputs(num_rows: int, width: int, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(2, num_rows // 2, width, generator=generator, device=device).to(DTYPES[device]).requires_grad_()


def forward_backward(loss_of: LossOf, z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss_of(z), z)
    return grad


def exact_gradient(loss: str, z: Tensor) -> Tensor:
    """The gradient in fp64, from the same rounded z."""
    z = z.detach().double().requires_grad_()
    return forward_backward(build("fastssl chunked", loss, device=z.device.type), z)


def gradient_error(loss_of: LossOf, z: Tensor, exact: Tensor | None) -> float | None:
    """|grad - exact| / |exact| in the Frobenius norm; includes the rounding of the gradient to z's dtype."""
    grad = forward_backward(loss_of, z).double()
    return None if exact is None else float((grad - exact).norm() / exact.norm())


# -- time


def measure_times(
    ready: dict[str, LossOf], z: Tensor, seconds: float
) -> tuple[dict[str, list[CallTime]], dict[str, str]]:
    """Return the times of each repetition, with the providers in alternation, and a note for each that failed."""
    times: dict[str, list[CallTime]] = {provider: [] for provider in ready}
    notes: dict[str, str] = {}
    for _ in range(1000):
        waiting = [
            name for name, found in times.items() if sum(max(each) for each in found) < seconds * 1e3 or len(found) < 3
        ]
        if not waiting:
            break
        for provider in waiting:
            try:
                call = partial(forward_backward, ready[provider], z)
                times[provider].append(time_call(call, z.device))
            except Exception as error:  # as in measure_cell
                notes[provider] = not_measured(error)
                del times[provider]
    return times, notes


def quantiles(times_ms: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return fifths[0], statistics.median(times_ms), fifths[3]


# -- memory


def peak_memory(provider: str, loss: str, z: Tensor) -> int:
    """Peak bytes of the forward and backward pass, including the gradient, above z and the memory allocated before.

    CUDA: from torch's allocator. CPU: the resident set of a separate process, whose malloc returns freed blocks.

    Raises:
        MemoryError: If the process was killed, as happens when memory runs out.
        RuntimeError: If the process failed; the message is its last line.
    """
    if z.is_cuda:
        _free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(build(provider, loss, device="cuda"), z)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--measure-peak", provider, loss, *map(str, (z.shape[1] * 2, z.shape[2]))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode < 0:
        raise MemoryError
    if found.returncode:
        raise RuntimeError(found.stderr.strip().rpartition("\n")[2])
    return int(found.stdout)


def _print_peak(provider: str, loss: str, num_rows: int, width: int) -> None:
    """Run by `peak_memory` in the separate process on the CPU."""
    loss_of = build(provider, loss, device="cpu")
    forward_backward(loss_of, _inputs(64, width, "cpu"))  # libraries allocate memory at their first call
    z = _inputs(num_rows, width, "cpu")
    _free()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_bytes("VmRSS")
    forward_backward(loss_of, z)
    print(_resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- limits of the device


def ceilings(device: str) -> list[dict[str, Any]]:
    """Rows for the fastest matrix product (in the dtype of the losses' operands) and for a copy."""
    n, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.float16)
    x = torch.randn(n, n, device=device).to(dtype)
    y = torch.empty_like(x)
    product_ms = min(time_call(lambda: torch.mm(x, x, out=y), x.device).ms for _ in range(5))
    copy_ms = min(time_call(lambda: y.copy_(x), x.device).ms for _ in range(5))
    rows = [
        {"loss": "ceiling", "provider": f"product {n} x {n}, {str(dtype).removeprefix('torch.')}", "ms_p50": product_ms}
        | {"tflop_per_s": 2 * n**3 / product_ms / 1e9},
        {"loss": "ceiling", "provider": f"copy of {x.nbytes >> 20} MiB", "ms_p50": copy_ms}
        | {"gb_per_s": 2 * x.nbytes / copy_ms / 1e6},
    ]
    rows = [_row(row) for row in rows]
    print(format_table(rows, ["provider", "ms_p50", "tflop_per_s", "gb_per_s"]), flush=True)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot milliseconds and peak memory over n, one column per loss, for the most measured width, if there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in rows if row.get("width") and row.get("ms_p50")]
    if not measured:
        return
    losses = list(dict.fromkeys(row["loss"] for row in measured))
    width = 128 if any(row["width"] == 128 for row in measured) else measured[0]["width"]
    figure, axes = pyplot.subplots(2, len(losses), figsize=(4 * len(losses), 7), squeeze=False, sharex=True)
    for column, loss in enumerate(losses):
        cells = [row for row in measured if (row["loss"], row["width"]) == (loss, width)]
        axes[0][column].set_title(f"{loss}, D = {width}")
        for axis, field, label in zip(axes[:, column], ("ms_p50", "peak_mb"), AXIS_LABELS, strict=True):
            for provider in PROVIDERS:
                points = sorted((row["rows"], row[field]) for row in cells if row["provider"] == provider)
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=provider)
            axis.set(xscale="log", yscale="log", ylabel=label, xlabel="rows n")
            axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA where there is one")
    parser.add_argument("--all", action="store_true", help="more numbers of rows and widths, and no limit of time")
    parser.add_argument("--minutes", type=float, help="what is not begun by then is left out")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows n, even")
    parser.add_argument("--widths", type=int, nargs="+", help="widths D")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--seconds", type=float, help="of the repetitions of one provider in one cell")
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to; a plot goes beside it")
    parser.add_argument("--measure-peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_peak:
        provider, loss, num_rows, width = args.measure_peak
        _print_peak(provider, loss, int(num_rows), int(width))
        sys.exit()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    seconds = math.inf if args.minutes is None else 60 * args.minutes
    if args.device == "cuda" and not (args.minutes or args.all or args.rows or args.widths):
        seconds = TABLE_SECONDS
    args.deadline_s = time.perf_counter() + seconds
    return args


if __name__ == "__main__":
    main()
