"""The configurations in configs/: each can be read, and its header says what a reader needs."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastssl.config import Config, load_config
from fastssl.models.two_view import build_projector
from pipelines.views import ViewSpec, build_view_specs
from tests.helpers.processes import ROOT

FOLDER = ROOT / "configs"
WHOLE = sorted([*FOLDER.glob("*.yaml"), *(FOLDER / "study").glob("*.yaml")])
PARTS = sorted([*(FOLDER / "data").glob("*.yaml"), *(FOLDER / "loss").glob("*.yaml")])
TUNED = sorted({*(FOLDER / "tuned_study").glob("*.yaml")} - {FOLDER / "tuned_study/base.yaml"})
METHODS = ("mio", "minc", "simclr", "spectral", "byol", "barlow_twins")
PAPER_ROWS = {
    "cifar10": ("small", "resnet18", 200),
    "cifar100": ("small", "resnet18", 200),
    "stl10": ("small", "resnet18", 200),
    "tiny_imagenet": ("small", "resnet18", 200),
    "imagenet100": ("imagenet", "resnet50", 200),
    "imagenet": ("imagenet", "resnet50", 100),
}


def composed(data: str, loss: str, overrides: Sequence[str] = ()) -> Config:
    return load_config([FOLDER / f"data/{data}.yaml", FOLDER / f"loss/{loss}.yaml"], overrides)


def header_of(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_config_is_whole_and_says_how_it_is_run(path: Path):
    cfg, header = load_config(path), header_of(path)
    of_study = path.parent.name == "study"
    name = "configs/study/*.yaml" if of_study else f"configs/{path.name}"
    assert name in header or path.stem == "demo"
    assert "Hardware: " in header
    assert "ot run yet" in header or "Result: benchmarks/results/" in header
    if path.stem != "demo":
        assert path.stem.startswith(cfg.loss.name)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_part_says_how_it_is_run_with_another(path: Path):
    command = " ".join(header_of(path).replace("#", " ").replace("\\", " ").split())
    start, _, end = command.partition(" --cfg ")
    names, run = end.split()[:2], re.search(r"--set (run\.dir=\S+)", start)
    assert str(path.relative_to(ROOT)) in names
    assert run is not None
    cfg = load_config([ROOT / name for name in names], [run[1]])
    assert cfg.run.dir == f"runs/{cfg.loss.name}_{Path(names[0]).stem}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", PAPER_ROWS)
def test_the_papers_rows_are_composed_of_parts(method, data):
    recipe, backbone, num_epochs = PAPER_ROWS[data]
    cfg = composed(data, f"{method}_{recipe}")
    assert (cfg.loss.name, cfg.model.backbone, cfg.train.num_epochs) == (method, backbone, num_epochs)
    assert cfg.data.train == f"data/{data}_train.beton"
    assert cfg.data.test
    assert cfg.train.precision == "bf16"


def test_the_wide_resnet_is_another_part():
    names = ("data/imagenet.yaml", "loss/minc_imagenet.yaml", "model/resnet50_w2.yaml")
    cfg, narrow = load_config([FOLDER / name for name in names]), composed("imagenet", "minc_imagenet")
    assert cfg.model.backbone_kwargs == {"channels": [128, 256, 512, 1024]}
    assert replace(cfg.model, backbone="resnet50", stem_channels=0, backbone_kwargs={}) == narrow.model


@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_the_tuned_study_compares_losses_with_one_recipe_and_heads_of_one_size(path: Path):
    base = FOLDER / "tuned_study/base.yaml"
    common, cfg = load_config(base), load_config([base, path])
    assert path.stem.startswith(cfg.loss.name)
    model = replace(cfg.model, projector_last_norm=common.model.projector_last_norm)
    assert replace(cfg, loss=common.loss, model=model) == common
    assert path.stem in (ROOT / "scripts/tuned_study.sh").read_text()
    assert "Hardware: " in header_of(base)


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_losses_that_find_the_constant_function_have_heads_that_can(path: Path):
    if path.parent.name == "loss":
        cfg = load_config(path)
        assert not (cfg.loss.needs_mean and cfg.model.projector_last_norm)


@pytest.mark.parametrize(("suffix", "learning_rate"), [("", 0.2), ("_b512", 0.8)])
@pytest.mark.parametrize("loss", ["mio", "simclr"])
def test_the_first_authors_small_data_recipe(loss, suffix, learning_rate):
    whole = FOLDER / f"{loss}_resnet18_cifar10_200ep_b512.yaml"
    cfg = load_config(whole) if suffix else composed("cifar10", f"{loss}_small")
    optim, model = cfg.optim, cfg.model
    assert cfg.data.global_batch_size == {"": 128, "_b512": 512}[suffix]
    assert optim.base_lr * cfg.data.global_batch_size / 256 == pytest.approx(learning_rate)
    assert (optim.name, optim.momentum, optim.weight_decay, optim.decay_all) == ("sgd", 0, 5e-4, True)
    assert (optim.schedule, optim.warmup_epochs, optim.final_lr_fraction) == ("epoch", 0, 0)
    assert (model.backbone, model.stem, model.projector_hidden, model.projector_dim) == (
        "resnet18",
        "cifar",
        (512,),
        128,
    )
    assert cfg.train.precision == "bf16"
    assert (cfg.views.mean, cfg.views.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    expected = ViewSpec(crop_scale=(0.08, 1.0), flip_p=0.5, jitter_p=0.8, grayscale_p=0.2)
    assert (expected.brightness, expected.contrast, expected.saturation, expected.hue) == (0.4, 0.4, 0.4, 0.1)
    assert build_view_specs(cfg.views) == (expected, expected)
    linears = [layer for layer in build_projector(512, model) if isinstance(layer, torch.nn.Linear)]
    assert [(layer.out_features, layer.bias) for layer in linears] == [(512, None), (128, None)]


@pytest.mark.parametrize("name", ["mio_resnet10_cifar10_20ep", "study/mio_exp", "study/byol"])
def test_configs_with_published_rows_keep_the_views_of_these_rows(name):
    cfg = load_config(ROOT / f"configs/{name}.yaml")
    assert {view.crop_scale for view in build_view_specs(cfg.views)} == {(0.2, 1.0)}
    assert cfg.views.std == (0.2470, 0.2435, 0.2616)
    assert (cfg.optim.momentum, cfg.optim.decay_all, cfg.optim.schedule) == (0.9, False, "step")
