"""Writing files so that a crash leaves either the old or the new content."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def replace_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see either the old or the new text."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """`replace_text` for any content."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        sync_file(file)
    os.replace(temporary, path)


def lock_file(file: IO[Any] | int) -> None:
    """Wait for an exclusive lock, held until the file is closed or the process ends.

    Does nothing where the file system does not support locks.
    """
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def sync_file(file: IO[Any]) -> None:
    """Flush the file and sync it to disk."""
    file.flush()
    os.fsync(file.fileno())
