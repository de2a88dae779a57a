"""The runs of a folder, from what they have written; nothing is locked, written, or imported from torch."""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import psutil

from fastssl.errors import ConfigError, UserError
from fastssl.machine.yaml_text import read_yaml
from fastssl.tracking.json_lines import read_rows
from fastssl.tracking.report import Report
from pipelines.files import read_file
from pipelines.printable import printable

State = Literal["running", "finished", "stopped", "crashed"]

COLUMNS = {
    "run": "run",
    "loss": "loss",
    "backbone": "backbone",
    "state": "state",
    "epochs": "epoch",
    "last": "last",
    "best": "best",
    "measure": "by",
    "time": "time",
    "changed": "last change",
}
DETAILS = ("state", "best", "epochs", "loss", "last", "measure", "changed", "time", "backbone")
_LOCK = re.compile(r"process (\d+) on (\S+) \([0-9a-f]+\)")  # fastssl.tracking.run_folder writes it
_CHECKPOINT = re.compile(r"step_(\d{8,})")
_MAX_SMALL_BYTES = 1 << 20
_RECENT_S = 600  # of a run on another host, whose processes cannot be seen


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        run: Path of its folder.
        loss, backbone: Their names.
        state: "finished": all epochs, and their checkpoint; "stopped": ended by a signal, with a checkpoint; "running":
            the process that locked the folder is alive, or, on another host, metrics.jsonl is less than ten minutes
            old; "crashed": none of these.
        num_epochs_done: Epochs that were completed.
        num_epochs: Epochs of the configuration.
        measure: What the accuracies are: "kNN" on held-out images, "probe", or None where the run measures neither.
        last_top1, best_top1: In [0, 1]; None without a measure.
        time_s: From the start of the run to its last row, pauses included; None: unknown.
        changed_utc: When it last wrote a row, or its configuration; ISO 8601.
    """

    run: str
    loss: str
    backbone: str
    state: State
    num_epochs_done: int
    num_epochs: int
    measure: Literal["kNN", "probe"] | None
    last_top1: float | None
    best_top1: float | None
    time_s: float | None
    changed_utc: str

    def row(self) -> dict[str, Any]:
        """Its row of the table."""
        percent = {"last": self.last_top1, "best": self.best_top1}
        changed = datetime.fromisoformat(self.changed_utc).astimezone()
        return {
            "run": self.run,
            "loss": self.loss,
            "backbone": self.backbone,
            "state": self.state,
            "epochs": f"{self.num_epochs_done}/{self.num_epochs}",
            **{name: None if top1 is None else f"{top1:.1%}" for name, top1 in percent.items()},
            "measure": self.measure,
            "time": None if self.time_s is None else str(timedelta(seconds=round(self.time_s))),
            "changed": f"{changed:%Y-%m-%d %H:%M}",
        }


def list_runs(folder: Path) -> Report:
    """The runs in a folder and its sub-folders, or the run that it is, by path.

    What is damaged or holds no run is named on stderr with the reason.

    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the folder that holds the runs, such as runs")
    runs = []
    for path in _folders(folder):
        try:
            runs.append(_read(path))
        except (ConfigError, OSError) as error:
            _skip(path, (error.strerror if isinstance(error, OSError) else None) or str(error))
    rows = [run.row() for run in runs]
    return Report(
        values={"rows": [asdict(run) for run in runs]},
        rows=rows,
        columns=COLUMNS,
        details=DETAILS,
        foot="" if rows else f"no runs in {folder}",
    )


def _folders(folder: Path) -> Iterator[Path]:
    """Folders that hold a config.yaml, by path; sub-folders of `folder` without any are named on stderr."""
    if (folder / "config.yaml").exists():
        yield folder
        return
    try:
        children = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): name another folder of runs") from None
    for child in children:
        is_empty = True
        for root, names, files in os.walk(child):
            names.sort()
            if "config.yaml" in files:
                names.clear()  # below a run are no others
                is_empty = False
                yield Path(root)
        if is_empty:
            _skip(child, "no run in it: no config.yaml")


def _skip(path: Path, reason: str) -> None:
    print(f"fastssl runs: {printable(path)} is skipped: {printable(reason)}", file=sys.stderr, flush=True)


def _read(path: Path) -> Run:
    """A run from its files.

    Raises:
        ConfigError: config.yaml is not the configuration of a run.
        OSError: a file cannot be read.
    """
    config, metrics = path / "config.yaml", path / "metrics.jsonl"
    tree = read_yaml(config)
    loss, backbone = _find(tree, "loss", "name"), _find(tree, "model", "backbone")
    num_epochs = _find(tree, "train", "num_epochs")
    if not (isinstance(loss, str) and isinstance(backbone, str) and type(num_epochs) is int):
        raise ConfigError("its config.yaml is not the configuration of a run")
    negative, own = _find(tree, "loss", "negative"), _find(tree, "custom", "model")
    rows = read_rows(metrics, "step", "epoch", containing=b'"kind"')
    ends = [row for row in rows if row.get("kind") == "epoch" and type(row["epoch"]) is int]
    num_done = ends[-1]["epoch"] + 1 if ends else 0
    changed_s = (metrics if metrics.exists() else config).stat().st_mtime
    is_complete = num_done >= num_epochs and ends[-1]["step"] in _checkpoint_steps(path / "checkpoints")
    started_s = _start_s(path / "environment.json")
    return Run(
        run=str(path),
        loss=f"{loss} {negative}" if isinstance(negative, str) else loss,
        backbone=own if isinstance(own, str) else backbone,
        state="finished" if is_complete else _state(path, changed_s),
        num_epochs_done=num_done,
        num_epochs=num_epochs,
        **_accuracy(rows),
        time_s=None if started_s is None else max(0.0, changed_s - started_s),
        changed_utc=datetime.fromtimestamp(changed_s, UTC).isoformat(timespec="seconds"),
    )


def _find(tree: Any, section: str, key: str) -> Any:
    found = tree.get(section) if isinstance(tree, Mapping) else None
    return found.get(key) if isinstance(found, Mapping) else None


def _accuracy(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for measure, kind, key in (("kNN", "held_out", "knn_top1"), ("probe", "epoch", "online_top1")):
        found = [row[key] for row in rows if row.get("kind") == kind and isinstance(row.get(key), float)]
        if found:
            return {"measure": measure, "last_top1": found[-1], "best_top1": max(found)}
    return {"measure": None, "last_top1": None, "best_top1": None}


def _checkpoint_steps(folder: Path) -> set[int]:
    if not folder.is_dir():
        return set()
    return {int(found[1]) for path in folder.iterdir() if (found := _CHECKPOINT.fullmatch(path.name))}


def _start_s(environment: Path) -> float | None:
    """When the run was started, in seconds since 1970; None: the file does not say so."""
    try:
        return datetime.fromisoformat(json.loads(read_file(environment, _MAX_SMALL_BYTES))["time_utc"]).timestamp()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _state(path: Path, changed_s: float) -> State:
    if (path / "preempted").exists():
        return "stopped"
    lock = path / "lock"
    try:
        written_s, text = lock.stat().st_mtime, read_file(lock, _MAX_SMALL_BYTES).decode(errors="replace")
    except OSError:
        return "crashed"
    found = _LOCK.fullmatch(text)
    if not found:
        return "crashed"
    if found[2] != socket.gethostname():
        return "running" if time.time() - changed_s < _RECENT_S else "crashed"
    return "running" if _wrote(int(found[1]), written_s) else "crashed"


def _wrote(process_id: int, written_s: float) -> bool:
    """Whether the process that wrote something at that time is alive; a later one of its number is another."""
    try:
        process = psutil.Process(process_id)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written_s + 1
    except (psutil.Error, OverflowError):
        return False
