"""Shared fixtures: real data sets as .beton files, and runs in real subprocesses."""

import re
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from fastssl.machine.thread_waiting import let_threads_sleep
from pipelines.torchvision_operators import declare_torchvision_operators
from tests.helpers.processes import ROOT, environment, run_command_forked

let_threads_sleep()  # before torch is imported: several workers share the cores
declare_torchvision_operators()  # tests import torchvision and timm plainly

# Enough of everything, small enough for seconds: digits at 16 px, a tiny ResNet with batch norm.
TINY = """
run: {dir: RUN, log_every_steps: 1, num_threads: 1, checkpoint_every_epochs: 1}
data: {train: TRAIN, test: TEST, global_batch_size: 128}
views: {recipe: digits, size_px: 16}
model: {backbone: timm/resnet18, stem: cifar, pool_px: 1, projector_hidden: [32], projector_dim: 16,
        backbone_kwargs: {channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}}
loss: {name: mio, temperature_positive: 0.2, temperature_negative: 0.2}
optim: {base_lr: 0.1, warmup_epochs: 0.5}
train: {num_epochs: 2}
eval: {knn_k: 20, few_labels: [5], baselines: true}
"""


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """`-m gpu`: skip a file that needs a package that is not installed: a GPU machine may have but torch and Triton."""
    report = yield
    missing = re.search(r"No module named '(pydantic|deepspeed|ffcv|nvidia\.dali)\b", str(report.longrepr))
    if report.failed and missing and collector.config.getoption("markexpr") == "gpu":
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.beton (1,297) and test.beton (500): scikit-learn's digits."""
    from pipelines.convert import convert

    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        convert("digits", None, folder / f"{split}.beton", split=split)
    return folder


@pytest.fixture
def tiny_config(digits: Path, tmp_path: Path) -> Path:
    """A YAML file of a two-epoch run on the digits; its run folder is tmp_path / "run"."""
    paths = {"RUN": tmp_path / "run", "TRAIN": digits / "train.beton", "TEST": digits / "test.beton"}
    text = TINY
    for name, path in paths.items():
        text = text.replace(name, str(path), 1)
    config = tmp_path / "tiny.yaml"
    config.write_text(text)
    return config


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of this environment from the repository's root; output captured, never a terminal."""

    def run(*arguments: str | Path, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, arguments)),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def in_process(capfd: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a `fastssl` command in this process, without the seconds that a new one takes to import torch."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        from fastssl.cli import main

        capfd.readouterr()
        code = main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.fixture
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a `fastssl` command in a process of its own that is forked from one with the imports of a training."""
    folder = tmp_path_factory.mktemp("forked")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_command_forked(list(map(str, arguments)), folder)

    return run
