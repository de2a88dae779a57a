"""One fuzz case of a conversion: a whole .beton, or one line, and nothing else."""

import os
import sys
from pathlib import Path
from typing import Any

from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.convert.sources import SourceKind
from pipelines.errors import DataError
from pipelines.verify import verify
from tests.helpers.fuzz import Case

STARTS = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn"}
_started: list[str] = []
_watched: list[bool] = []


def convert_or_refuse(case: Case, kind: SourceKind, path: Path, **options: Any) -> BetonReader | None:
    """Convert a source next to it; None if it was refused in one line that names it, without leaving files."""
    out = path.parent / f"{path.name}.beton"
    for left in path.parent.glob(f"{out.name}*"):
        left.unlink()
    _watch()
    with case.guarded(memory_mb=1024 + 100 * len(os.sched_getaffinity(0))):  # each thread has a stack and an arena
        try:
            convert(kind, str(path), out, on_error=("fail", "skip")[case.seed % 2], **options)
            message = ""
        except DataError as error:
            message = str(error)
        assert _started == []
        if not message:
            verify(out, num_threads=1)
            return BetonReader(out)
        assert message.isprintable()
        assert path.name in message
        assert {left.name for left in path.parent.glob(f"{out.name}*")} <= {f"{out.name}.errors.txt"}
    return None


def _watch() -> None:
    """Note every process that this one starts, from the first call on."""
    if not _watched:
        _watched.append(True)
        sys.addaudithook(lambda event, _: _started.append(event) if event in STARTS else None)
    _started.clear()
