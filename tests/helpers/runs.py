"""Small runs and weights, and the results of a run, for tests that compare two runs."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastssl.checkpoint.save_load import last_checkpoint, plain_weights
from fastssl.config import build_config
from fastssl.models.two_view import TwoViewModel
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.preprocessing import describe_preprocessing
from tests.helpers.processes import ROOT

TINY_VIEWS = {"recipe": "simsiam_small", "size_px": 24}
TINY_MODEL = {"backbone": "timm/resnet18", "backbone_kwargs": {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}}

TIMING = (
    "img_per_s", "data_wait_fraction", "memory_bytes", "model_tflops_per_device", "communication_ms_per_step",
)  # fmt: skip


def train_tiny_run(beton: Path, folder: Path) -> None:
    """Train an encoder of 8 features at 24 px for one epoch at batch 8, by `fastssl.train` in another process."""
    sections = {"views": TINY_VIEWS, "model": TINY_MODEL, "optim": {"warmup_epochs": 0}, "train": {"num_epochs": 1}}
    tree = {"data": {"train": str(beton), "engine": "resident", "global_batch_size": 8}, "run": {"dir": str(folder)}}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code = f"import fastssl; from fastssl.config import build_config; fastssl.train(build_config({tree | sections!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_run(path: Path, *, epochs_done: int = 1, held_out: tuple[float, ...] = (), **sections: Any) -> RunFolder:
    """A run of three epochs of ten steps, as its training leaves it after `epochs_done` of them."""
    folder = RunFolder(path)
    train = {"num_epochs": 3}
    folder.create(
        build_config({"train": train, "optim": {"warmup_epochs": 1}, "run": {"dir": str(path)}} | sections), 1
    )
    rows = []
    for epoch in range(epochs_done):
        place = {"step": 10 * (epoch + 1), "epoch": epoch}
        rows.append(place | {"loss": 1.0})
        rows.append({"kind": "epoch"} | place | {"online_top1": 0.25 + epoch / 100})
        if held_out:
            rows.append({"kind": "held_out"} | place | {"knn_top1": held_out[epoch]})
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder.checkpoints / f"step_{10 * epochs_done:08d}").mkdir(parents=True)
    return folder


def write_tiny_weights(file: Path, seed: int = 0, **views: Any) -> Path:
    """A weights.pt as of `train_tiny_run`, at random weights and with batch-norm statistics of noise."""
    cfg = build_config({"views": TINY_VIEWS | views, "model": TINY_MODEL})
    torch.manual_seed(seed)
    model = TwoViewModel(cfg.model, cfg.views.size_px or 24)
    model.train()(list(torch.randn(2, 8, 3, 24, 24)))
    about = describe_preprocessing(cfg.views)
    torch.save(plain_weights(model, asdict(cfg.model), cfg.views.size_px or 24, preprocessing=about), file)
    return file


def losses(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without times, and without what the network did."""
    return [
        {k: v for k, v in row.items() if k not in (*TIMING, "remote_retries")}
        for row in read_rows(run / "metrics.jsonl")
    ]


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
