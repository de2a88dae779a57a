"""Sweep the tiles of the one-pass loss kernel: time, error, registers and spills of each configuration.

    python benchmarks/tune_tiles.py --out benchmarks/results/tiles.csv            # on a GPU, about a minute
    python benchmarks/tune_tiles.py --device cpu --smoke                          # in Triton's interpreter

Each case is the workload of one loss: `exp` and `softplus` for pair losses (sums, slopes and pulls), and the two passes
of NT-Xent (`exp sums`, `exp weighted pulls`). The error is measured against fp64 on some of the rows.
"""

# n rows in 2 views of n / 2 samples, D width; a matrix product over all n^2 pairs has 2 n^2 D operations

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastssl.tracking.result_rows import append_rows, environment_columns, format_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels.similarity.tiles import TileConfig

# Triton selects its interpreter at its first import, so torch and the kernels are imported inside the functions.

PACKAGES = ("torch", "triton", "numpy")
NUM_VIEWS = 2
NUM_CHECKED_ROWS = 256  # of each view: their fp64 logits with all rows are 256 MB at n = 65,536
MAX_COMPILERS = 8  # processes
Tiles = tuple[int, int, int, int, int]
CONFIGS: list[Tiles] = [
    (64, 64, 4, 3, 3),
    (64, 64, 4, 4, 3),
    (64, 128, 4, 2, 2),
    (64, 128, 4, 3, 2),
    (128, 128, 8, 2, 1),
    (128, 128, 8, 3, 1),
]
SMOKE_CONFIGS: list[Tiles] = [(16, 16, 4, 1, 1), (16, 32, 4, 2, 1)]
TILE_COLUMNS = ("tile_rows", "tile_columns", "num_warps", "stages", "programs")
COLUMNS = ("case", "rows", "width", *TILE_COLUMNS, "in_use")
COLUMNS += ("ms_p20", "ms_p50", "ms_p80", "num_repetitions", "tflop_per_s", "error", "registers", "spills")
COLUMNS += ("shared_bytes", "device", "seed", "note")
SHOWN = ("case", "rows", "width", *TILE_COLUMNS, "in_use", "ms_p50")
SHOWN += ("tflop_per_s", "error", "registers", "spills", "note")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The workload of a loss.

    Attributes:
        kind: The function f, see kernels/similarity.
        wide_range: See `kernels.similarity.Term`.
        inv_temperature: The inverse temperature t.
        bias: The bias b.
        outputs: The accumulators to compute.
        weighted: Whether the pulls are weighted, as in the second pass of NT-Xent.
    """

    kind: str
    inv_temperature: float = 5.0
    bias: float = 0.0
    wide_range: bool = False
    outputs: tuple[str, ...] = ("sums", "slopes", "pulls")
    weighted: bool = False

    @property
    def num_products(self) -> int:
        """The number of matrix products over all pairs: one for the logits, one for the pulls."""
        return 1 + ("pulls" in self.outputs)


CASES = {
    "exp": Case(kind="exp"),
    "exp wide": Case(kind="exp", wide_range=True, inv_temperature=20.0, bias=-20.0),
    "softplus": Case(kind="softplus"),
    "exp sums": Case(kind="exp", wide_range=True, bias=-5.0, outputs=("sums",)),
    "exp weighted pulls": Case(kind="exp", wide_range=True, bias=-5.0, outputs=("pulls",), weighted=True),
}


class Problem:
    """The rows and accumulators of a case; z, n and D are the same for every configuration."""

    def __init__(self, case: Case, num_rows: int, width: int, device: str, seed: int) -> None:
        import torch

        from kernels.similarity import Term
        from kernels.similarity.fused import normalize

        generator = torch.Generator(device).manual_seed(seed)
        shape = (NUM_VIEWS, num_rows // NUM_VIEWS)
        z = torch.randn(*shape, width, generator=generator, device=device)
        self.case, self.width = case, width
        self.inv_temperature, self.bias = (torch.tensor(x, device=device) for x in (case.inv_temperature, case.bias))
        self.u = normalize(z, self.inv_temperature).u
        self.weights = torch.rand(shape, generator=generator, device=device) if case.weighted else None
        self.term = Term(
            kind=case.kind,  # pyright: ignore[reportArgumentType]
            inv_temperature=self.inv_temperature,
            bias=self.bias,
            wide_range=case.wide_range,
        )
        self.z = z

    def side(self) -> Any:
        """The rows, with accumulators of zeros."""
        from kernels.similarity import Side

        new = self.z.new_zeros
        shapes = {"sums": self.z.shape[:2], "slopes": self.z.shape[:2], "pulls": self.z.shape}
        return Side(u=self.u, weights=self.weights, **{name: new(shapes[name]) for name in self.case.outputs})

    def run(self, side: Any, config: TileConfig | None) -> None:
        """Add all pairs to the accumulators; `config` None uses the default tiles."""
        from kernels.similarity.tiles import accumulate_tiles

        accumulate_tiles(side, side, self.term, (0, NUM_VIEWS), (0, NUM_VIEWS), config)

    def exact(self) -> dict[str, Tensor]:
        """The outputs for the first NUM_CHECKED_ROWS of each view, computed from z in fp64."""
        import torch
        from torch.nn import functional as F

        z = F.normalize(self.z.double(), dim=2)
        checked, columns = z[:, :NUM_CHECKED_ROWS].flatten(0, 1), z.flatten(0, 1)
        logits = checked @ columns.T * self.inv_temperature.double() + self.bias.double()
        sample = torch.arange(z.shape[1], device=z.device)
        own = sample[:NUM_CHECKED_ROWS].repeat(NUM_VIEWS)[:, None] == sample.repeat(NUM_VIEWS)
        is_exp = self.case.kind == "exp"
        values = (logits.exp() if is_exp else F.softplus(logits)).masked_fill_(own, 0)
        slopes = values if is_exp else logits.sigmoid().masked_fill_(own, 0)
        if self.weights is not None:
            weights = self.weights.double()
            slopes = slopes * (weights[:, :NUM_CHECKED_ROWS].flatten()[:, None] + weights.flatten())
        found = {"sums": values.sum(1), "slopes": slopes.sum(1), "pulls": slopes @ columns}
        return {name: found[name].view(NUM_VIEWS, -1, *found[name].shape[1:]) for name in self.case.outputs}


def error_of(side: Any, exact: dict[str, Tensor]) -> float:
    """The largest |output - exact| / |exact| of the outputs, in the Frobenius norm."""
    return max(
        float((getattr(side, name)[:, :NUM_CHECKED_ROWS].double() - x).norm() / x.norm()) for name, x in exact.items()
    )


class _Recorder:
    """Replaces the kernel and keeps the return value of its last launch, the compiled kernel."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self.compiled = kernel, None

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.compiled = self._kernel[grid](*args, **kwargs)

        return launch


def tiles_in_use(case: Case, width: int) -> Tiles:
    """The tiles that the kernels use for a case on a GPU, without groups."""
    from kernels.similarity.tiles import choose_config

    return choose_config(
        max(16, 1 << (width - 1).bit_length()),
        case.weighted,
        False,
        only_pulls=case.outputs == ("pulls",),
        narrow_exp=case.kind == "exp" and not case.wide_range,
        wide_exp=case.kind == "exp" and case.wide_range,
        only_sums=case.outputs == ("sums",),
    )


def measure(problem: Problem, tiles: Tiles, exact: dict[str, Tensor], seconds: float) -> dict[str, Any]:
    """Measure one configuration; return its columns, with the reason under "note" if it cannot run."""
    from kernels.similarity import tiles as module

    config, case = module.TileConfig(*tiles), problem.case
    row: dict[str, Any] = dict(zip(TILE_COLUMNS, tiles, strict=True))
    row["in_use"] = "yes" if tiles == tiles_in_use(case, problem.width) else ""
    recorder = _Recorder(module.one_pass_rows)
    try:
        side = problem.side()
        with patch.object(module, "one_pass_rows", recorder):
            problem.run(side, config)
        row["error"] = error_of(side, exact)
        times_ms = time_ms(lambda: problem.run(side, config), problem.z.device, seconds)
    except Exception as error:  # too much shared memory, for example: continue with the others
        return row | {"note": f"not measured: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"}
    p20, p50, p80 = quantiles(times_ms)
    num_rows = problem.z.shape[0] * problem.z.shape[1]
    row |= {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "num_repetitions": len(times_ms)}
    row["tflop_per_s"] = 2 * case.num_products * num_rows**2 * problem.width / p50 / 1e9
    if recorder.compiled is not None and problem.z.is_cuda:
        kernel = recorder.compiled
        row |= {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared_bytes": kernel.metadata.shared}
    return row


def time_ms(call: Any, device: torch.device, seconds: float) -> list[float]:
    """Times of single calls, at least three; on a GPU from events, without waiting on the host in between."""
    import torch

    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return [(time.perf_counter() - started) * 1e3]
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds * 1e3:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(events)]
    return times


def quantiles(times_ms: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(times_ms) == 1:
        return times_ms[0], times_ms[0], times_ms[0]
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return fifths[0], statistics.median(times_ms), fifths[3]


def compile_ahead(cells: Sequence[tuple[str, int, int, Tiles]], seed: int) -> None:
    """Fill Triton's cache in several processes; a failure here occurs again, with a note, in the measurement."""
    num = min(MAX_COMPILERS, len(os.sched_getaffinity(0)), len(cells))
    if num < 2:
        return
    spawn = multiprocessing.get_context("spawn")
    with contextlib.suppress(BrokenExecutor), ProcessPoolExecutor(num, mp_context=spawn) as pool:
        wait([pool.submit(_compile, cell, seed) for cell in cells])


def _compile(cell: tuple[str, int, int, Tiles], seed: int) -> None:
    from kernels.similarity.tiles import TileConfig

    case, num_rows, width, tiles = cell
    problem = Problem(CASES[case], num_rows, width, "cuda", seed)
    problem.run(problem.side(), TileConfig(*tiles))


def fastest(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each case, n and D, with the fastest configuration and the one in use."""
    lines = []
    for cell in dict.fromkeys((row["case"], row["rows"], row["width"]) for row in rows):
        measured = [row for row in rows if (row["case"], row["rows"], row["width"]) == cell and row["ms_p50"]]
        if not measured:
            lines.append(f"{cell[0]}, n = {cell[1]}, D = {cell[2]}: nothing could be measured")
            continue
        best = min(measured, key=lambda row: row["ms_p50"])
        in_use = next((row["ms_p50"] for row in measured if row["in_use"]), None)
        ratio = f", {in_use / best['ms_p50']:.3f} times as fast as the one in use" if in_use else ""
        tiles = tuple(best[name] for name in TILE_COLUMNS)
        lines.append(f"{cell[0]}, n = {cell[1]}, D = {cell[2]}: {tiles} takes {best['ms_p50']} ms{ratio}")
    return lines


def _row(values: dict[str, Any]) -> dict[str, Any]:
    """All columns, with floats rounded to four digits."""
    row = {name: values.get(name) for name in COLUMNS} | {"note": values.get("note", "")}
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    args = _parse()
    os.environ["TRITON_INTERPRET"] = "1" if args.device == "cpu" else "0"
    environment = environment_columns(PACKAGES)
    started = time.perf_counter()
    problems = list(product(args.cases, args.rows, args.widths))
    if args.device == "cuda":
        compile_ahead([(*problem, tiles) for problem in problems for tiles in args.configs], args.seed)
        print(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for name, num_rows, width in problems:
        problem = Problem(CASES[name], num_rows, width, args.device, args.seed)
        exact = problem.exact()
        fixed = {"case": name, "rows": num_rows, "width": width, "device": args.device, "seed": args.seed}
        found = [_row(fixed | measure(problem, tiles, exact, args.seconds)) for tiles in args.configs]
        print(format_table(found, SHOWN), flush=True)
        if args.out:
            append_rows(args.out, [row | environment for row in found])
        rows += found
    print(*fastest(rows), sep="\n")
    print(f"{time.perf_counter() - started:.1f} s")
    if not any(row["ms_p50"] for row in rows):
        sys.exit(f"tune_tiles: error: no configuration could be measured: {rows[0]['note']}")


def _tiles(text: str) -> Tiles:
    """Parse the five numbers of a text such as `64,128,4,2,2`."""
    try:
        rows, columns, num_warps, stages, programs = (int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not rows,columns,warps,stages,programs") from None
    if rows < 16 or rows & (rows - 1) or columns & (columns - 1) or columns < rows:
        raise argparse.ArgumentTypeError(f"{text!r}: rows and columns must be powers of two, 16 <= rows <= columns")
    if num_warps not in (1, 2, 4, 8, 16) or stages < 1 or programs < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: warps must be 1, 2, 4, 8 or 16, stages and programs >= 1")
    return rows, columns, num_warps, stages, programs


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and tiles: does it work")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of rows n, even (default: 65536)")
    parser.add_argument("--widths", type=int, nargs="+", help="widths D, 16 to 256 (default: 128)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--configs", nargs="+", type=_tiles, metavar="ROWS,COLUMNS,WARPS,STAGES,PROGRAMS", help="tiles to try"
    )
    parser.add_argument("--seconds", type=float, default=0.1, help="of the repetitions of one configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="X.csv", help="file to append the rows to")
    args = parser.parse_args()
    args.rows = args.rows or [64 if args.smoke else 65536]
    args.widths = args.widths or [16 if args.smoke else 128]
    args.configs = args.configs or (SMOKE_CONFIGS if args.smoke else CONFIGS)
    if any(n < 32 or n % NUM_VIEWS for n in args.rows):
        parser.error("--rows must be even and >= 32")
    if not all(8 <= width <= 256 for width in args.widths):
        parser.error("--widths must be in 8..256: wider rows take other kernels")
    if args.seconds <= 0:
        parser.error("--seconds must be > 0")
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu is Triton's interpreter, which needs hours for these sizes: add --smoke")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU here (--device cpu --smoke tries the script)")
    return args


if __name__ == "__main__":
    main()
