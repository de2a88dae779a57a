"""The results of a run, for tests that compare two runs."""

from pathlib import Path
from typing import Any

import torch

from fastssl.checkpoint.save_load import last_checkpoint
from fastssl.tracking.writers import read_rows

TIMING = (
    "img_per_s", "data_wait_fraction", "memory_bytes", "model_tflops_per_device", "communication_ms_per_step",
)  # fmt: skip


def losses(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without times."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(run / "metrics.jsonl")]


def final_state(run: Path) -> dict[str, Any]:
    """All tensors and numbers at the end of a run: weights, optimizer, each rank's buffers, the probe."""
    folder = last_checkpoint(run / "checkpoints")
    assert folder is not None
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.pt")):
        collect(torch.load(file, weights_only=True), file.name, found)
    return found


def collect(value: Any, name: str, found: dict[str, Any]) -> None:
    """Store the leaves of nested dictionaries and lists in `found`, by their paths."""
    if isinstance(value, dict):
        for key, item in value.items():
            collect(item, f"{name}/{key}", found)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            collect(item, f"{name}/{index}", found)
    else:
        found[name] = value


def assert_same_end(run_a: Path, run_b: Path) -> None:
    """Assert that two runs have the same final state, bit for bit, and the same rows."""
    a, b = final_state(run_a), final_state(run_b)
    assert a.keys() == b.keys()
    assert sum(isinstance(value, torch.Tensor) for value in a.values()) > 20
    assert [name for name in a if not _same(a[name], b[name])] == []
    assert losses(run_a) == losses(run_b)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
