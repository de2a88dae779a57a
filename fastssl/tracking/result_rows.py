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

_LEAST_CHARS = 12  # of a column whose texts are shortened


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


def rounded(row: Row, num_digits: int) -> dict[str, Value]:
    """A row whose floats have at most so many significant digits."""
    return {
        name: float(f"{value:.{num_digits}g}") if isinstance(value, float) else value for name, value in row.items()
    }


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


def format_table(rows: Sequence[Row], columns: Sequence[str] | Mapping[str, str]) -> str:
    """The given columns as an aligned text table: numbers right-aligned, None as "-".

    Args:
        rows: The rows.
        columns: Their keys, in order; or keys and headings.
    """
    return _aligned(*_cells(rows, columns))


def fit_table(
    rows: Sequence[Row], columns: Mapping[str, str], details: Sequence[str] = (), max_chars: int | None = None
) -> tuple[str, str]:
    """`format_table` in a given width: details are left out, the last of them first, then long texts are shortened.

    Args:
        rows: The rows.
        columns: Keys and headings, in order.
        details: Keys of the columns that may be left out.
        max_chars: Largest length of a line; None: any.
    Returns:
        The table, and a line that names what is left out or shortened and how to see it; empty if nothing is.
    """
    shown, left = dict(columns), list(details)
    while max_chars is not None and left and _num_chars(_cells(rows, shown)[0]) > max_chars:
        del shown[left.pop()]
    cells, right = _cells(rows, shown)
    is_cut = max_chars is not None and _shorten(cells, right, max_chars)
    hidden = [heading for name, heading in columns.items() if name not in shown]
    what = [f"not shown: {', '.join(hidden)}"] if hidden else []
    what += ["long texts are shortened"] if is_cut else []
    return _aligned(cells, right), f"{'; '.join(what)} (--wide shows all)" if what else ""


def _cells(rows: Sequence[Row], columns: Sequence[str] | Mapping[str, str]) -> tuple[list[list[str]], list[bool]]:
    """The texts of the table, headings first, and which columns hold numbers."""
    headings = [*columns.values()] if isinstance(columns, Mapping) else list(columns)
    body = [["-" if row[name] is None else printable(row[name]) for name in columns] for row in rows]
    return [headings, *body], [all(isinstance(row[name], int | float | None) for row in rows) for name in columns]


def _num_chars(cells: Sequence[Sequence[str]]) -> int:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def _shorten(cells: list[list[str]], right: Sequence[bool], max_chars: int) -> bool:
    """Shorten the widest text columns until the table fits, none below `_LEAST_CHARS`; whether anything is."""
    is_cut = False
    while (excess := _num_chars(cells) - max_chars) > 0:
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        texts = sorted((width, i) for i, width in enumerate(widths) if not right[i] and width > _LEAST_CHARS)
        if not texts:
            return is_cut
        width, i = texts[-1]
        second = texts[-2][0] if len(texts) > 1 else _LEAST_CHARS
        width = max(_LEAST_CHARS, width - excess, min(second, width - 1))
        for line in cells:
            is_cut |= len(line[i]) > width
            line[i] = printable(line[i], width)
    return is_cut


def _aligned(cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in cells
    ]
    return "\n".join(lines)
