"""The short benchmark of the engines: rows of those that are here, reasons of those that are not."""

import csv
import sys
from pathlib import Path

import pytest

from benchmarks import bench_engines
from benchmarks.bench_engines import figures
from pipelines.bench.windows import Measured, Window


def test_median_least_and_largest_or_the_reason() -> None:
    windows = [Window(img_per_s=speed, busy_elsewhere_fraction=0.1) for speed in (30.0, 10.0, 20.0)]
    found, absent = figures(Measured(windows)), figures(Measured(reason="ffcv is not\ninstalled"))
    assert [found[f"img_per_s_{key}"] for key in ("p50", "min", "max")] == [20.0, 10.0, 30.0]
    assert list(found) == list(absent)
    assert absent["img_per_s_p50"] is None
    assert absent["note"] == "not measured: ffcv is not installed"


@pytest.mark.slow
def test_rows_of_a_run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "engines.csv"
    options = ["--engines", "synthetic", "--recipe", "digits", "--size-px", "16", "--batch-size", "64"]
    options += ["--seconds", "0.1", "--repetitions", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_engines.py", str(digits / "train.beton"), *options])
    assert bench_engines.main() == 0
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert row["engine"] == "synthetic"
    assert float(row["img_per_s_p50"]) > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch-size", "99999"], "--batch-size"),
        (["--recipe", "nonsense"], "nonsense"),
        (["--seconds", "0"], "--seconds"),
        (["--engines", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str],
    named: str,
    digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_engines.py", str(digits / "train.beton"), *arguments])
    try:
        code = bench_engines.main()
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
