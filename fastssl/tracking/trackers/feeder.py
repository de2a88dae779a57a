"""The training's side of trackers: it starts a process for each, and tells it how the training ended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastssl.tracking.trackers.tracker import End
from pipelines.printable import printable

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastssl.tracking.trackers.follow import main; main(*sys.argv[2:])"
)
_HAS_WARNED = 1  # the exit code of a process that has printed why
# Launchers kill what is left half a minute after a stop signal.
WAIT_S: dict[End, float] = {"finished": 300.0, "preempted": 10.0, "failed": 10.0}


class Feeder:
    """Feeds the trackers of a run from its metrics.jsonl; nothing here waits before `close`.

    Attributes:
        processes: By tracker, until `close`.
    """

    def __init__(self, run: Path, folder: Path, trackers: Sequence[str]) -> None:
        """Start a process for each tracker.

        Args:
            run: The run's folder, with config.yaml, environment.json and metrics.jsonl.
            folder: Where trackers may write; it is made.
            trackers: Their names.
        """
        self._metrics = run / "metrics.jsonl"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in trackers:
            try:
                folder.mkdir(exist_ok=True)
                self.processes[name] = _start(name, run.absolute(), folder.absolute())
            except OSError as error:
                self._warn(f"{name} gets no rows ({error.strerror}); the training and {self._metrics} go on")

    def close(self, end: End) -> None:
        """Tell the trackers how the training ended, and wait for them, but not for long; the rows must be written."""
        for process in self.processes.values():
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:  # it may have ended
                process.stdin.write(end.encode() + b"\n")
        until = time.monotonic() + WAIT_S[end]
        for name, process in self.processes.items():
            try:
                code = process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._warn(f"{name} did not take its rows within {WAIT_S[end]:.0f} s: {self._metrics} has all of them")
            else:
                if code not in (0, _HAS_WARNED):
                    self._warn(f"{name} ended early (code {code}): {self._metrics} has all rows")
        self.processes = {}

    def _warn(self, text: str) -> None:
        print(printable(f"fastssl: warning: {text}"), file=sys.stderr, flush=True)


def _start(name: str, run: Path, folder: Path) -> "subprocess.Popen[bytes]":
    path = json.dumps([os.path.abspath(each) for each in sys.path])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, path, run, folder, name, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
