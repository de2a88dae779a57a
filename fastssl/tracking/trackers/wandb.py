"""A run in Weights & Biases: offline unless WANDB_MODE says otherwise."""

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastssl.tracking.trackers.tracker import PROJECT, End, RunFacts, histograms, numbers

_OFFLINE = ("offline", "dryrun")


class Wandb:
    """One W&B run with all rows of metrics.jsonl.

    An offline run cannot be resumed: of two folders with the same id, the one that is synced last replaces the other.
    So the folder of before is deleted, and the rows, which come from the first one on, make a whole one. Online the run
    is resumed, and rows that W&B has are left out.
    """

    def __init__(self, facts: RunFacts) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode in _OFFLINE:
            for old in (facts.folder / "wandb").glob(f"offline-run-*-{facts.id}"):
                shutil.rmtree(old)
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            dir=str(facts.folder),
            id=facts.id,
            name=os.environ.get("WANDB_NAME") or facts.name,
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            config={**facts.config, "environment": facts.environment},
            mode=mode,  # pyright: ignore[reportArgumentType]  # of the user's variable: W&B says what is wrong with it
            resume=None if mode in _OFFLINE else "allow",
            # What it would add about this process is not the training's.
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
            ),
        )
        self._first_step = self._run.step  # 0, or one more than the last that the server has

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if row["step"] < self._first_step:
                continue
            values: dict[str, Any] = {**numbers(row), "epoch": row.get("epoch")}
            for name, counts in histograms(row).items():
                edges = np.linspace(-1, 1, len(counts) + 1)
                values[name] = self._histogram(np_histogram=(np.asarray(counts), edges))
            self._run.log(values, step=row["step"])

    def close(self, end: End) -> None:
        self._run.finish(exit_code=0 if end == "finished" else 1)
