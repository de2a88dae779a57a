"""What a command found: a table that fits the terminal for people, JSON for programs."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.tracking.result_rows import Row, fit_table
from pipelines.printable import printable_lines


@dataclass(frozen=True, kw_only=True)
class Report:
    """A table with the lines around it, and the same as values.

    Attributes:
        values: For --json: what the table shows, not rounded, and more; JSON values, paths and numbers of numpy.
        rows: The rows of the table, rounded.
        columns: Keys of the rows and their headings, in the order of the table.
        details: Keys of columns that a narrow terminal goes without, the first to leave last.
        head: Lines above the table.
        foot: Lines below the table.
    """

    values: Mapping[str, Any]
    rows: Sequence[Row]
    columns: Mapping[str, str]
    details: Sequence[str] = field(default=())
    head: str = ""
    foot: str = ""

    def text(self, max_chars: int | None = None) -> str:
        """The lines for a person, safe to print.

        Args:
            max_chars: Width of the terminal in characters; None: all columns, in any width.
        """
        parts = [self.head, *fit_table(self.rows, self.columns, self.details, max_chars), self.foot]
        lines = [line for part in parts if part for line in printable_lines(part).split("\n")]
        return "\n".join("\n".join(_wrapped(line, max_chars)) for line in lines)

    def __str__(self) -> str:
        return self.text()


def to_json(values: Any) -> str:
    """Values as JSON text: a number that is not finite becomes null, which every reader takes, and a path its text."""
    return json.dumps(_plain(values), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wrapped(line: str, max_chars: int | None) -> list[str]:
    """A line of words on as many lines as it takes; one of a table, which already fits, and a path stay whole."""
    if max_chars is None or len(line) <= max_chars or "  " in line.strip():
        return [line]
    return textwrap.wrap(line, max_chars, break_long_words=False, break_on_hyphens=False)
