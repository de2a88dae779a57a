"""The process that feeds one tracker: it follows metrics.jsonl until the training says that it ends, or is gone.

A process, so that a step waits for nothing of a tracker: not for its imports, the interpreter's lock, its network or
its disk. What goes wrong here is one line of warning; the training does not learn of it.
"""

import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast, get_args

from fastssl.machine.files import lock_file
from fastssl.tracking.json_lines import parse_row
from fastssl.tracking.trackers.tracker import End, Tracker, read_facts
from pipelines.printable import printable

_LOOK_EVERY_S = 1.0
_LEAVE_WITHIN_S = 300  # of the training's end, where nobody is left who would not wait longer
_SHOWN = 300  # characters of a library's message
_SECRETS = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")


def main(run: str, folder: str, name: str, parent: str) -> None:
    """Feed a tracker until the training ends.

    Args:
        run: The run's folder.
        folder: Where trackers may write.
        name: Of the tracker.
        parent: The training's process id.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the training decides when a run ends
    os.nice(5)
    terminal = os.fdopen(os.dup(2), "w")
    with open(os.devnull, "w") as nowhere:  # the libraries' own lines
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        with (Path(folder) / f"{name}.lock").open("a") as lock, (Path(run) / "metrics.jsonl").open("rb") as metrics:
            lock_file(lock)  # the process of a training that was killed may still be leaving
            _feed(_open(name, Path(run), Path(folder)), metrics, int(parent))
    except Exception as error:
        print(_warning(name, run, error), file=terminal, flush=True)
        terminal.close()
        os._exit(1)  # what the library does at an exit may wait for a network
    os._exit(0)


def _open(name: str, run: Path, folder: Path) -> Tracker:
    facts = read_facts(run, folder)
    if name == "wandb":
        from fastssl.tracking.trackers.wandb import Wandb

        return Wandb(facts)
    from fastssl.tracking.trackers.mlflow import Mlflow

    return Mlflow(facts)


def _feed(tracker: Tracker, metrics: IO[bytes], parent: int) -> None:
    end: End | None = None
    while end is None:
        end = _end_of_training(parent)
        if end is not None:
            signal.alarm(_LEAVE_WITHIN_S)
        if rows := list(_new_rows(metrics)):  # after the end was asked for: all rows are there then
            tracker.write(rows)
    tracker.close(end)


def _end_of_training(parent: int) -> End | None:
    """How the training ended, or None a moment later; a training that says nothing has failed or was killed."""
    ready, _, _ = select.select([sys.stdin], [], [], _LOOK_EVERY_S)
    if not ready:
        # A process that the training has forked may hold the pipe.
        return None if os.getppid() == parent else "failed"
    word = sys.stdin.readline().strip()
    return cast(End, word) if word in get_args(End) else "failed"


def _new_rows(metrics: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The rows that were written since the last call; the end of a line that is being written is left."""
    while (line := metrics.readline()).endswith(b"\n"):
        if (row := parse_row(line, ("step",))) is not None:
            yield row
    metrics.seek(-len(line), os.SEEK_CUR)


def _warning(name: str, run: str, error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"//[^/@\s]*@", "//", text)  # user and password of an address
    for variable, value in os.environ.items():
        if _SECRETS.search(variable) and len(value) > 3:
            text = text.replace(value, "***")
    where = Path(run) / "metrics.jsonl"
    return printable(f"fastssl: warning: {name} gets no more rows ({text[:_SHOWN]}); the training and {where} go on")
