"""Reads the sidecar of a .beton file."""

import json
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.files import read_file

MAX_SIDECAR_BYTES = 32 << 20  # room for the names of several hundred thousand classes
MAX_CLASSES = 1_000_000


def read_sidecar(path: Path) -> dict[str, Any]:
    """Contents of a sidecar, with the number of images and, if known, the names of the classes.

    Raises:
        OSError: no such file.
        DataError: not a sidecar of `fastssl convert`, or larger than `MAX_SIDECAR_BYTES`.
    """
    try:
        found = json.loads(read_file(path, MAX_SIDECAR_BYTES))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise DataError(f"{path}: not a sidecar of `fastssl convert`{reason}; delete it or convert again") from error
    names = found.get("class_names") if isinstance(found, dict) else None
    is_list = isinstance(names, list) and len(names) <= MAX_CLASSES and all(isinstance(name, str) for name in names)
    if not isinstance(found, dict) or type(found.get("num_images")) is not int or not (names is None or is_list):
        raise DataError(f"{path}: not a sidecar of `fastssl convert`; delete it or convert again")
    return found
