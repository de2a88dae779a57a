"""The configurations in configs/: each can be read, and its header says what a reader needs."""

from pathlib import Path

import pytest

from fastssl.config import load_config
from tests.processes import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAPER_ROWS = {
    "cifar10": ("resnet18", 200),
    "cifar100": ("resnet18", 200),
    "stl10": ("resnet18", 200),
    "tiny_imagenet": ("resnet18", 200),
    "imagenet100": ("resnet50", 200),
    "imagenet": ("resnet50", 100),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_whole_and_says_how_it_is_run(path: Path):
    cfg = load_config(path)
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    of_study = path.parent.name == "study"
    name = "configs/study/*.yaml" if of_study else f"configs/{path.name}"
    assert name in header or path.stem == "demo"
    assert "Hardware: " in header
    assert "ot run yet" in header or "Result: benchmarks/results/" in header
    if path.stem != "demo":
        assert path.stem.startswith(cfg.loss.name)


@pytest.mark.parametrize("method", ["mio", "minc", "simclr", "spectral", "byol", "barlow_twins"])
@pytest.mark.parametrize("data", PAPER_ROWS)
def test_the_papers_rows_have_a_config(method, data):
    backbone, num_epochs = PAPER_ROWS[data]
    cfg = load_config(ROOT / f"configs/{method}_{backbone}_{data}_{num_epochs}ep.yaml")
    assert (cfg.loss.name, cfg.model.backbone, cfg.train.num_epochs) == (method, backbone, num_epochs)
    assert cfg.run.dir == f"runs/{method}_{data}"
    assert cfg.data.train == f"data/{data}_train.beton"
    assert cfg.data.test
