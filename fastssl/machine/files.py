"""Writing files so that a crash leaves the old content or the new one."""

import os
from pathlib import Path
from typing import IO, Any


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        sync_file(file)
    os.replace(temporary, path)


def sync_file(file: IO[Any]) -> None:
    """Return when all that was written to the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())
