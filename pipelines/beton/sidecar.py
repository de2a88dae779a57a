"""Reads the sidecar of a .beton file."""

import json
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.files import read_file

MAX_SIDECAR_BYTES = 32 << 20  # room for the names of several hundred thousand classes
MAX_CLASSES = 1_000_000
MAX_OTHER_BYTES = 1 << 17  # of what it holds next to the classes; a conversion writes about 1 kB
MAX_DEPTH = 16


def read_sidecar(path: Path) -> dict[str, Any]:
    """Contents of a sidecar, with the number of images and, if known, the names of the classes.

    Raises:
        OSError: no such file.
        DataError: not a sidecar of `fastssl convert`, or larger than `MAX_SIDECAR_BYTES`.
    """
    try:
        text = read_file(path, MAX_SIDECAR_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _no_sidecar(path, f" ({error.strerror})") from error
    return parse_sidecar(text, path)


def parse_sidecar(text: bytes, path: str | Path) -> dict[str, Any]:
    """Contents of a sidecar that was read already; see `read_sidecar`.

    Args:
        text: At most `MAX_SIDECAR_BYTES`.
        path: The file, or its URL, for messages.
    """
    try:
        found = json.loads(text)
        is_sidecar = isinstance(found, dict) and type(found.get("num_images")) is int and _is_small(found)
    except (ValueError, RecursionError) as error:
        raise _no_sidecar(path) from error
    names = found.get("class_names") if is_sidecar else None
    is_list = isinstance(names, list) and len(names) <= MAX_CLASSES and all(isinstance(name, str) for name in names)
    if not is_sidecar or not (names is None or is_list):
        raise _no_sidecar(path)
    return found


def _no_sidecar(path: str | Path, reason: str = "") -> DataError:
    return DataError(f"{path}: not a sidecar of `fastssl convert`{reason}; delete it or convert again")


def _is_small(found: dict[str, Any]) -> bool:
    """Whether what is not about classes can be shown at once: neither much nor deep."""
    rest = {key: value for key, value in found.items() if key not in ("class_names", "class_counts")}
    return len(json.dumps(rest)) <= MAX_OTHER_BYTES and all(_depth(value) < MAX_DEPTH for value in rest.values())


def _depth(value: Any) -> int:
    """How deep lists and dictionaries are nested."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)
