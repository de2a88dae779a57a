"""Shared by measurements: environment columns, statistics over repetitions, CSV files and tables.

A benchmark's row is `{its own columns} | environment_columns(packages)`, written by `append_rows`.
"""

import csv
import io
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.printable import printable

Value = str | int | float | None
Row = Mapping[str, Value]


def environment_columns(packages: Sequence[str]) -> dict[str, Value]:
    """The columns that make a measurement reproducible.

    Args:
        packages: Distributions whose versions matter, e.g. ("torch", "ffcv").
    Returns:
        command, cpu, num_cpus, gpus (names; empty without GPUs), python, one column per package (None if it is not
        installed), commit (with "-dirty" if tracked files have changes) and time_utc.
    """
    from fastssl.machine.environment import describe_environment, package_version

    found = describe_environment(world_size=1)
    versions = {name.replace("-", "_"): package_version(name) for name in packages}
    return {
        "command": command_line(sys.argv),
        "cpu": found["cpu"],
        "num_cpus": found["num_cpus"],
        "gpus": "; ".join(found["gpus"]),
        "python": found["python"],
        **versions,
        "commit": found["commit"],
        "time_utc": found["time_utc"],
    }


def command_line(argv: Sequence[str]) -> str:
    """`python` or `fastssl` and its arguments; absolute paths are cut to their last part, as the rest is local."""
    script = Path(argv[0])
    program = ["python", "/".join(script.parts[-2:])] if script.suffix == ".py" else [script.name]
    return shlex.join([*program, *map(_without_folders, argv[1:])])


def _without_folders(argument: str) -> str:
    """`/a/b` -> `b`, `key=/a/b` -> `key=b`."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{Path(value).name}" if value.startswith("/") else argument


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of the repetitions: keys p50, min and max."""
    return {"p50": statistics.median(values), "min": min(values), "max": max(values)}


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a CSV file; the file, its folder and its header are created if missing.

    Args:
        path: The file.
        rows: All with the same keys in the same order; None is an empty cell. Floats must be rounded already.
    Raises:
        ValueError: rows differ in their keys, or the file has other columns.
    """
    columns = list(rows[0]) if rows else []
    if any(list(row) != columns for row in rows):
        raise ValueError("rows of one table must have the same columns")
    text = path.read_text() if path.exists() else ""
    if text and next(csv.reader(io.StringIO(text))) != columns:
        raise ValueError(f"{path} has different columns: choose another file, or move this one away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not text:
            writer.writeheader()
        writer.writerows(rows)


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The given columns as an aligned text table: numbers right-aligned, None as "-"."""
    cells = [list(columns), *[["-" if row[name] is None else printable(row[name]) for name in columns] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(isinstance(row[name], int | float | None) for row in rows) for name in columns]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join(lines)
