"""What every measurement's rows share."""

import csv
from pathlib import Path

import pytest

from fastssl.tracking.result_rows import append_rows, command_line, environment_columns, format_table, spread

ENVIRONMENT = {"command", "cpu", "num_cpus", "gpus", "python", "torch", "scikit_learn", "commit", "time_utc"}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_under_one_header_with_the_environment(tmp_path):
    columns = environment_columns(("torch", "scikit-learn"))
    assert set(columns) == ENVIRONMENT
    out = tmp_path / "new" / "rows.csv"
    append_rows(out, [{"name": "a, b", "img_per_s": 1.5} | columns])
    append_rows(out, [{"name": "c", "img_per_s": None} | columns, {"name": "d", "img_per_s": 2} | columns])
    rows = read(out)
    assert [(row["name"], row["img_per_s"]) for row in rows] == [("a, b", "1.5"), ("c", ""), ("d", "2")]
    assert all(set(row) == {"name", "img_per_s", *ENVIRONMENT} and row["cpu"] and row["torch"] for row in rows)


def test_rows_of_other_columns_are_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "rows.csv"
    append_rows(out, [{"a": 1, "b": 2}])
    before = out.read_text()
    with pytest.raises(ValueError, match="has different columns"):
        append_rows(out, [{"a": 1, "c": 2}])
    with pytest.raises(ValueError, match="same columns"):
        append_rows(out, [{"a": 1, "b": 2}, {"a": 1}])
    assert out.read_text() == before


def test_the_recorded_command_holds_no_folders_of_the_machine():
    assert command_line(["benchmarks/bench_x.py", "--data", "/some/where/x y.beton", "--seconds", "2"]) == (
        "python benchmarks/bench_x.py --data 'x y.beton' --seconds 2"
    )
    assert command_line(["/home/a/repository/benchmarks/bench_x.py", "--n=/b/c"]) == (
        "python benchmarks/bench_x.py --n=c"
    )
    assert command_line(["/home/a/.venv/bin/fastssl", "bench", "/b/c.beton"]) == "fastssl bench c.beton"


def test_spread_and_table():
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"p50": 2.5, "min": 1.0, "max": 10.0}
    table = format_table([{"name": "a", "x": 10.5}, {"name": "bcd", "x": None}], ["name", "x"])
    assert table.splitlines() == ["name     x", "a     10.5", "bcd      -"]
