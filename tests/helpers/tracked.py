"""Runs to be tracked, and what trackers hold of them: an offline run of W&B, a store of MLflow."""

import json
import os
import struct
from pathlib import Path
from typing import Any

from fastssl.tracking.json_lines import read_rows
from fastssl.tracking.trackers.tracker import numbers

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, struct.Struct("<IHB")  # checksum, length, part of a record
_WHOLE, _LAST = 1, 4


def write_run(folder: Path) -> Path:
    """The files of a run that a tracker reads, without a row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("run: {dir: x}\nloss: {name: mio}\nviews: {specs: [{a: 1}]}\nds: {}\n")
    (folder / "environment.json").write_text(json.dumps({"command": ["p", "--my-key"], "packages": {"torch": "2"}}))
    (folder / "run.json").write_text(json.dumps({"id": "0123456789abcdef"}))
    (folder / "metrics.jsonl").touch()
    return folder


def append_rows(run: Path, first: int, last: int) -> None:
    """A row for each of these steps, and one of an epoch after every second one."""
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            file.write(
                json.dumps({"step": step, "epoch": (step - 1) // 2, "loss": 1 / step, "loss_scale": None}) + "\n"
            )
            if step % 2 == 0:
                row = {
                    "kind": "epoch",
                    "step": step,
                    "epoch": step // 2 - 1,
                    "rankme": step,
                    "positive_counts": [1.0, 2.0],
                }
                file.write(json.dumps(row) + "\n")


def rows_of_file(run: Path) -> dict[str, dict[int, float]]:
    """The numbers of metrics.jsonl by name and step."""
    found: dict[str, dict[int, float]] = {}
    for row in read_rows(run / "metrics.jsonl", "step"):
        for name, value in numbers(row).items():
            assert row["step"] not in found.setdefault(name, {})
            found[name][row["step"]] = value
    return found


def rows_of_wandb(run: Path) -> dict[str, dict[int, float]]:
    """The numbers of the one offline run, by name and step; each step stands there once."""
    found: dict[str, dict[int, float]] = {}
    steps = []
    for record in wandb_records(run):
        if not record.HasField("history"):
            continue
        step = record.history.step.num
        steps.append(step)
        for item in record.history.item:
            name, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
            if isinstance(value, int | float) and not name.startswith("_") and name != "epoch":
                found.setdefault(name, {})[step] = value
    assert len(steps) == len(set(steps))
    return found


def wandb_records(run: Path) -> list[Any]:
    """The records of the one offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "trackers/wandb").glob("offline-run-*/*.wandb")
    return [Record.FromString(data) for data in _records(file.read_bytes())]


def _records(data: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format, behind W&B's header."""
    records, parts, at = [], b"", _FILE_HEADER
    while at + _HEADER.size <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        parts += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            records.append(parts)
            parts = b""
    return records


def rows_of_mlflow(run: Path) -> dict[str, dict[int, float]]:
    """The numbers of the one MLflow run, by name and step; each step stands there once."""
    client, found = mlflow_client(run), mlflow_run(run)
    rows = {}
    for name in found.data.metrics:
        history = client.get_metric_history(found.info.run_id, name)
        rows[name] = {each.step: each.value for each in history}
        assert len(rows[name]) == len(history)
    return rows


def mlflow_run(run: Path) -> Any:
    """The one MLflow run in the run's folder."""
    client = mlflow_client(run)
    (found,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return found


def mlflow_client(run: Path) -> Any:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=(run / "trackers/mlflow").as_uri())
