"""Names that no file can have here, found before anything is opened under them."""

import os
from pathlib import Path

_MAX_NAME_BYTES = 255  # of one folder or file, on every file system that Linux mounts
_MAX_PATH_BYTES = 4095


def why_no_path(path: str | Path) -> str | None:
    """Why a path cannot be used, in words; None: it can.

    Names that are not UTF-8 are refused too: a run's YAML and JSON files could not hold them.
    """
    text = str(path)
    if "\0" in text:
        return "it has a NUL character"
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return "it is not UTF-8"
    if len(encoded) > _MAX_PATH_BYTES:
        return f"it has {len(encoded)} bytes, more than {_MAX_PATH_BYTES}"
    longest = max(map(len, encoded.split(os.fsencode(os.sep))))
    return f"a name in it has {longest} bytes, more than {_MAX_NAME_BYTES}" if longest > _MAX_NAME_BYTES else None
