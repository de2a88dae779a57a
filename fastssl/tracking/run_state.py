"""What a run says of itself in its files: state, epochs, accuracy, time; nothing is locked or imported from torch."""

import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from fastssl.errors import ConfigError
from fastssl.machine.yaml_text import read_yaml
from fastssl.tracking.json_lines import read_rows
from pipelines.files import read_file

State = Literal["running", "finished", "stopped", "crashed"]

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


def read_run(path: Path) -> Run:
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
