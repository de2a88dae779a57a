"""The sweep of tiles, in Triton's interpreter: every configuration computes the case's sums, and the rows say so."""

import csv
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.tune_tiles import CASES, CONFIGS, Problem, tiles_in_use
from tests.helpers.processes import ROOT, environment

COMMAND = [sys.executable, "benchmarks/tune_tiles.py", "--device", "cpu", "--smoke"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)


def test_rows_of_every_case(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "tiles.csv"
    done = run("--rows", "40", "--configs", "16,16,4,1,1", "16,32,4,2,1", "--out", out)
    assert done.returncode == 0, done.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        assert 1e-6 < float(row["error"]) < 5e-3, row  # fp16's rounding, and no more
        assert float(row["ms_p50"]) > 0
    assert {row["case"] for row in rows} == {"exp", "exp wide", "softplus", "exp sums", "exp weighted pulls"}
    assert "exp sums, n = 40, D = 16: (16, " in done.stdout


@pytest.mark.parametrize("name", CASES)
def test_the_sweep_has_the_tiles_in_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from kernels.similarity import tiles

    chosen: list[Any] = []
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "_num_slots", lambda _, config: chosen.append(config) or exit_now())
    monkeypatch.setattr("kernels.similarity.fused.normalize", lambda z, t: SimpleNamespace(u=z.half()))
    problem = Problem(CASES[name], 64, 128, "cpu", 0)
    with pytest.raises(StopIteration):
        problem.run(problem.side(), None)
    assert chosen == [tiles_in_use(CASES[name], 128)]
    assert tuple(chosen[0]) in CONFIGS


def exit_now() -> None:
    raise StopIteration


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--configs", "128,64,4,3,2"], "128,64,4,3,2"),
        (["--configs", "64,64"], "rows,columns,warps,stages,programs"),
        (["--rows", "33"], "--rows"),
        (["--widths", "512"], "--widths"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_bad_input_ends_with_one_line(arguments: list[str], named: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]
