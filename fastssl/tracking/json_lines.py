"""Files of JSON lines, such as metrics.jsonl: read and cut, whatever a kill or an edit has left in them."""

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastssl.errors import ConfigError
from fastssl.machine.files import replace_bytes
from pipelines.files import open_regular
from pipelines.printable import printable

_MAX_SHOWN = 5  # bad lines of a file, by number


def read_rows(path: Path, *keys: str, containing: bytes = b"") -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, such as metrics.jsonl; one warning names the lines that are skipped.

    Args:
        path: The file; a missing one has no rows.
        keys: Keys that a row must have. "step" must be a number of steps wherever it is.
        containing: Skip the lines without this text, unread.

    Raises:
        ConfigError: it cannot be read, or is not a regular file.
    """
    rows, bad = [], []
    for number, line in enumerate(_lines_of(path), start=1):
        if containing not in line:
            continue
        row = parse_row(line, keys)
        if row is not None:
            rows.append(row)
        elif line.strip():
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:_MAX_SHOWN])) + (f" and {len(bad) - _MAX_SHOWN} more" * (len(bad) > _MAX_SHOWN))
        _warn_once(f"{path}: skipped what is not a row: line{'s' * (len(bad) > 1)} {shown}")
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Keep only the rows up to a checkpoint's step; a resumed run writes the later ones again.

    Lines that are not rows stay as they are: somebody has edited the file.
    """
    read_rows(path, "step")  # for its warning
    kept = []
    for line in _lines_of(path):
        row = parse_row(line, ("step",))
        if row is None or row["step"] <= step:
            kept.append(line + b"\n")
    replace_bytes(path, b"".join(kept))


def _lines_of(path: Path) -> list[bytes]:
    """The lines of a file, without a row at the end that a kill has cut off."""
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): move it away") from None
    last = lines.pop()
    if last and (parse_row(last, ()) is not None or not last.startswith(b"{")):
        lines.append(last)
    return lines


def parse_row(line: bytes, keys: Sequence[str]) -> dict[str, Any] | None:
    """The row in a line with these keys; None: the line is something else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or any(key not in row for key in keys):
        return None
    step = row.get("step", 0)
    return row if type(step) is int and 0 <= step < 2**63 else None


@cache
def _warn_once(message: str) -> None:
    print(printable(f"fastssl: warning: {message}"), file=sys.stderr, flush=True)
