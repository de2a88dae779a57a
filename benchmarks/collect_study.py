"""Collect the tables of `scripts/tuned_study.sh` in one CSV file, and print the accuracies of all its losses together.

    python benchmarks/collect_study.py runs/tuned --out benchmarks/results/tuned_study.csv

Each comparison below the folder has written its compare.csv, with its accuracies on held-out or on test images, and
tune.csv, with the values that were tried. A row of OUT that is measured again is replaced, others stay: call it before
and after `scripts/tuned_study.sh --on-test`. `--gradnorm X.csv`, from `fastssl gradnorm`, adds the norms of the losses'
gradients to the printed table.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastssl.commands.compare.compare_runs import SHOWN, summarise
from fastssl.machine.files import replace_text
from fastssl.tracking.result_rows import format_table

KEYS = ("comparison", "stage", "config", "tuned", "seed", "metric", "scored_on")
NORM = "relative_to_simclr"
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the rows and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the comparisons' folders are in it")
    parser.add_argument("--out", type=Path, required=True, metavar="X.csv")
    parser.add_argument("--gradnorm", type=Path, metavar="X.csv", help="table of fastssl gradnorm")
    arguments = parser.parse_args(argv)
    try:
        norms = {row["loss"]: float(row[NORM]) for row in read(arguments.gradnorm)} if arguments.gradnorm else {}
        found = rows_of(arguments.folder)
        rows = merged(read(arguments.out) if arguments.out.exists() else [], found)
        write(arguments.out, rows)
    except (ValueError, OSError) as error:
        sys.exit(f"collect_study: error: {error}")
    for title, table in tables(rows, norms):
        print(f"{title}\n{table}\n")


def rows_of(folder: Path) -> list[Row]:
    """The rows of all comparisons, each with its folder's name and its stage, "tune" or "compare".

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is another table.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob("*/compare.csv")) + sorted(folder.glob("*/tune.csv")):
        found = [{"comparison": path.parent.name, "stage": path.stem, "tuned": ""} | row for row in read(path)]
        if missing := next((key for row in found for key in KEYS if key not in row), None):
            raise ValueError(f"{path} has no column {missing}: it is not a table of fastssl compare")
        rows += found
    if not rows:
        raise FileNotFoundError(f"{folder} holds no */compare.csv: run scripts/tuned_study.sh first")
    return rows


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows and the new ones, which replace those of the same measurement."""
    rows = {tuple(row[key] for key in KEYS): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def tables(rows: Sequence[Row], norms: dict[str, float]) -> list[tuple[str, str]]:
    """Title and table of the losses, then of each sweep over the batch size, for each part that was scored."""
    found: list[tuple[str, str]] = []
    compared = [row | {"seed": int(row["seed"]), "percent": float(row["percent"])} for row in rows if
                row["stage"] == "compare"]  # fmt: skip
    for scored_on in sorted({row["scored_on"] for row in compared}):
        scored = [row for row in compared if row["scored_on"] == scored_on]
        sweep = [row for row in scored if row["comparison"].startswith("batch_")]
        losses = [row | {"config": label_of(row)} for row in scored if row not in sweep]
        for title, part in (("losses", losses), ("batch sizes", sweep)):
            if part:
                summary = [row | {NORM: norms.get(row["config"].partition(",")[0])} for row in summarise(part)]
                found.append((f"{title}: top-1 in % on {scored_on}", format_table(summary, (*SHOWN, "tuned", NORM))))
    return found


def label_of(row: Row) -> str:
    """The configuration's name, which says so where the temperature was chosen as well."""
    return f"{row['config']}, temperature chosen" if row["comparison"].endswith("_temperature") else row["config"]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a CSV file in one piece.

    Raises:
        ValueError: rows differ in their columns.
    """
    columns = [*KEYS, *(name for name in rows[0] if name not in KEYS)]
    if wrong := next((row for row in rows if set(row) != set(columns)), None):
        raise ValueError(
            f"{wrong['comparison']} has other columns than {rows[0]['comparison']}: collect them separately"
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


if __name__ == "__main__":
    main()
