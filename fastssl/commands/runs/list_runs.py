"""The runs of a folder, as a table; nothing is locked, written, or imported from torch."""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastssl.errors import ConfigError, UserError
from fastssl.tracking.report import Report
from fastssl.tracking.run_state import Run, read_run
from pipelines.printable import printable

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
            runs.append(read_run(path))
        except (ConfigError, OSError) as error:
            _skip(path, (error.strerror if isinstance(error, OSError) else None) or str(error))
    rows = [_row(run) for run in runs]
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


def _row(run: Run) -> dict[str, Any]:
    """Its row of the table."""
    percent = {"last": run.last_top1, "best": run.best_top1}
    changed = datetime.fromisoformat(run.changed_utc).astimezone()
    return {
        "run": run.run,
        "loss": run.loss,
        "backbone": run.backbone,
        "state": run.state,
        "epochs": f"{run.num_epochs_done}/{run.num_epochs}",
        **{name: None if top1 is None else f"{top1:.1%}" for name, top1 in percent.items()},
        "measure": run.measure,
        "time": None if run.time_s is None else str(timedelta(seconds=round(run.time_s))),
        "changed": f"{changed:%Y-%m-%d %H:%M}",
    }
