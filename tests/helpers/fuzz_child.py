"""Fuzz cases in a child process, so that a signal or a hang of native code is seen as a failure of its case."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.fuzz import Case
from tests.helpers.processes import forkserver

NUM_WARM_UP = 10  # cases until libraries have what they keep
MAX_GROWTH_BYTES = 256 << 20


class FuzzChild:
    """A process that runs one case after the other, and how its memory grew meanwhile.

    Attributes:
        growth_bytes: Of the resident memory since the first `NUM_WARM_UP` cases of each function.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._pipe, theirs = forkserver().Pipe()
        self._process = forkserver().Process(target=_serve, args=(theirs, log), daemon=True)
        self._process.start()
        theirs.close()
        self._resident: list[int] = []

    def run(self, check: Callable[..., None], case: Case, *arguments: Any, seconds: float = 60.0) -> None:
        """Run `check(case, *arguments)` there; what it raises, and its death, are failures of the case."""
        with case.guarded(seconds=seconds, memory_mb=64 << 10):  # limits the time here, the memory there
            try:
                self._pipe.send((check, case, arguments))
                failure, resident = self._pipe.recv()
            except EOFError:
                self._process.join()
                failure, resident = f"exit code {self._process.exitcode}", 0
            assert not failure, f"{failure}\n{self._log.read_text()[-5000:]}"
        self._resident.append(resident)

    def begin(self) -> None:
        """Forget how much memory there was."""
        self._resident.clear()

    def growth_bytes(self) -> int:
        later = self._resident[NUM_WARM_UP:]
        return max(later) - later[0] if later else 0

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


@contextmanager
def fuzz_child(log: Path) -> Iterator[FuzzChild]:
    """A child for the tests of a file."""
    child = FuzzChild(log)
    try:
        yield child
    finally:
        child.stop()


def _serve(pipe: Connection, log: Path) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    while True:
        check, case, arguments = pipe.recv()
        os.truncate(log, 0)
        try:
            check(case, *arguments)
            failure = ""
        except BaseException:
            failure = traceback.format_exc()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        pipe.send((failure, pages * os.sysconf("SC_PAGESIZE")))
