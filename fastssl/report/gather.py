"""What a run's folder holds for its report: read from files that may be missing, unfinished or damaged."""

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.config import read_tree
from fastssl.errors import ConfigError
from fastssl.tracking.json_lines import read_rows
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.run_state import Run, read_run
from fastssl.tracking.writers import training_time
from pipelines.files import read_file
from pipelines.printable import printable

_MAX_NAME_CHARS = 60
_MAX_BYTES = 16 << 20  # of a picture or a small file
_EVALUATION_KEYS = (
    "encoder", "name", "top1", "top1_sd", "top1_each", "top5", "interval95_test_images", "interval95_repetitions",
    "repeated_over", "chosen",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The density of a Hessian's eigenvalues, as `fastssl hessian` wrote it.

    Attributes:
        step: Step of the checkpoint, such as "step_00000100".
        eigenvalues: Grid, float64 [n].
        density: On the grid, integral 1, float64 [n].
    """

    step: str
    eigenvalues: np.ndarray
    density: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The files of one run.

    Attributes:
        folder: Its folder.
        name: By which the page tells it from other runs; printable.
        run: State, epochs, accuracy.
        tree: config.yaml as it was written.
        environment: environment.json; empty if it is missing or damaged.
        rows: metrics.jsonl.
        evaluations: The whole lines of eval.jsonl.
        nonfinite: The skipped steps, nonfinite.jsonl.
        views: views.png; None: there is none.
        spectra: The spectra in hessian/, by step.
    """

    folder: RunFolder
    name: str
    run: Run
    tree: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    nonfinite: list[dict[str, Any]]
    views: bytes | None
    spectra: list[Spectrum]

    def of_kind(self, kind: str | None) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl: "epoch", "held_out", or None for those of steps."""
        return [row for row in self.rows if row.get("kind") == kind]

    def section(self, name: str) -> dict[str, Any]:
        """A section of config.yaml; empty where there is none."""
        return as_mapping(self.tree.get(name))

    @cached_property
    def speed(self) -> tuple[float, int] | None:
        """Seconds that the whole epochs took and the images they read; None: no epoch is whole."""
        size = self.section("data").get("global_batch_size")
        return training_time(self.folder.metrics, size) if isinstance(size, int) else None


def gather(path: Path) -> Gathered:
    """Read a run's folder; what is missing or damaged is left out, but for its configuration.

    Raises:
        ConfigError: there is no run, or its configuration or metrics cannot be read.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(f"{path} is not the folder of a run: it has no config.yaml")
    try:
        run = read_run(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return Gathered(
        folder=folder,
        name=printable(path, _MAX_NAME_CHARS),
        run=run,
        tree=read_tree(folder.config),
        environment=_mapping(folder.environment),
        rows=read_rows(folder.metrics, "step"),
        evaluations=read_rows(folder.evaluations, *_EVALUATION_KEYS),
        nonfinite=read_rows(folder.nonfinite, "step", "sample_ids"),
        views=_bytes(folder.views),
        spectra=[found for at in sorted(folder.hessian.glob("step_*")) if (found := _spectrum(at))],
    )


def _bytes(path: Path) -> bytes | None:
    try:
        return read_file(path, _MAX_BYTES)
    except OSError:
        return None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_bytes(path) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return as_mapping(found)


def as_mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _spectrum(folder: Path) -> Spectrum | None:
    try:
        lines = (_bytes(folder / "density.csv") or b"").decode().splitlines()
        points = np.array([[float(row["eigenvalue"]), float(row["density"])] for row in csv.DictReader(lines)])
    except (ValueError, KeyError, TypeError, csv.Error):
        return None
    if not len(points) or not np.isfinite(points).all():
        return None
    return Spectrum(step=printable(folder.name), eigenvalues=points[:, 0], density=points[:, 1])
