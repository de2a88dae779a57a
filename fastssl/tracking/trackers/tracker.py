"""What a tracker does with the rows of a run, and what it is told about the run."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastssl.machine.yaml_text import read_yaml
from pipelines.files import read_file

End = Literal["finished", "preempted", "failed"]
PROJECT = "fastssl"  # of the runs, where the tracker's own variable names no other

_NO_VALUES = ("kind", "step", "epoch")
_NOT_TOLD = ("command",)  # of a user's own program, whatever its arguments are


class Tracker(Protocol):
    """The run in one tracker, from its opening on; each method may raise anything, which ends the tracker."""

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take new rows of metrics.jsonl, in their order; rows that the tracker has are no error."""
        ...

    def close(self, end: End) -> None:
        """Take leave of the run: no row follows until it is resumed."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a tracker is told about a run.

    Attributes:
        id: Of the run, the same after a resume.
        name: The name of its folder.
        folder: Where a tracker may write.
        config: config.yaml, nested.
        environment: environment.json, nested: hardware and versions.
    """

    id: str
    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]


def read_facts(run: Path, folder: Path) -> RunFacts:
    """The facts of a run, from the files in its folder."""
    environment = json.loads(read_file(run / "environment.json"))
    id_file = run / "run.json"
    if id_file.exists():
        run_id = json.loads(read_file(id_file))["id"]
    else:  # a run that is older than these ids
        run_id = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    return RunFacts(
        id=run_id,
        name=run.name,
        folder=folder,
        config=read_yaml(run / "config.yaml"),
        environment={name: value for name, value in environment.items() if name not in _NOT_TOLD},
    )


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names that TensorBoard has for them, such as step/loss."""
    return {
        f"{row.get('kind', 'step')}/{key}": value
        for key, value in row.items()
        if key not in _NO_VALUES and isinstance(value, int | float)
    }


def histograms(row: Mapping[str, Any]) -> dict[str, list[float]]:
    """The counts of a row's histograms, in equal bins from -1 to 1, by name."""
    return {f"{row.get('kind', 'step')}/{key}": value for key, value in row.items() if isinstance(value, list)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of a nested mapping, and their values as text."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
