"""Results of evaluations: one JSON line each, and the rows of a table."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastssl.errors import ConfigError
from fastssl.machine.files import lock_file

Line = dict[str, Any]
SHOWN = {
    "encoder": "encoder",
    "protocol": "protocol",
    "top1": "top-1 in %",
    "top5": "top-5",
    "test_images": "95%: test images",
    "repetitions": "95%: repetitions",
    "settings": "settings",
}
DETAILS = ("test_images", "top5", "repetitions", "settings")
LEGEND = (
    "test images: Wilson's 95% interval, what their number leaves open. repetitions: Student's 95% interval over the "
    "classifier's seeds, or over draws of the labelled images. Neither covers the seed of the pre-training."
)


def append_line(path: Path, line: Line) -> None:
    """Append one result to a file of JSON lines, in one write; a last line that a kill has cut off is removed.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            lock_file(file)  # no line of another evaluation comes in between
            os.write(file, _end_last_line(path) + (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from None


def _end_last_line(path: Path) -> bytes:
    """Remove a last result that a kill has cut off; returns what another last line lacks."""
    whole, end, last = path.read_bytes().rpartition(b"\n")
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        if last.startswith(b"{"):
            os.truncate(path, len(whole + end))
            last = b""
    return b"\n" if last else b""


def table_row(line: Line) -> dict[str, str]:
    """A result as texts for a table with the columns of `SHOWN`, accuracies in percent."""
    spread = "" if line["top1_sd"] is None else f" ± {_percent(line['top1_sd'])}"
    repetitions = line["interval95_repetitions"]
    repeated = (
        "-" if repetitions is None else f"{_interval(repetitions)} ({len(line['top1_each'])} {line['repeated_over']})"
    )
    return {
        "encoder": line["encoder"],
        "protocol": line["name"],
        "top1": f"{_percent(line['top1'])}{spread}",
        "top5": "-" if line["top5"] is None else _percent(line["top5"]),
        "test_images": _interval(line["interval95_test_images"]),
        "repetitions": repeated,
        "settings": " ".join(f"{name}={_plain(value)}" for name, value in line["chosen"].items()),
    }


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _interval(interval: Sequence[float]) -> str:
    return f"{_percent(interval[0])} to {_percent(interval[1])}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
