import dataclasses
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastssl.config import Config, build_config, differing_keys, free_keys, load_config, to_dict
from fastssl.errors import ConfigError
from fastssl.losses import LOSSES, MioConfig
from fastssl.machine.yaml_text import dump_yaml
from pipelines.view_spec import EvalViewSpec
from pipelines.views import ViewSpec, build_view_specs

ROOT = Path(__file__).resolve().parents[2]


def test_set_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("run: {seed: 1}\noptim: {base_lr: 1e-4, weight_decay: 0.1}\n")
    cfg = load_config(path, ["optim.weight_decay=1e-6", "loss.negative=jensen"])
    assert (cfg.run.seed, cfg.optim.base_lr, cfg.optim.weight_decay) == (1, 1e-4, 1e-6)
    assert cfg.loss.name == "mio"
    assert cfg.loss.negative == "jensen"
    assert cfg.train.num_epochs == Config().train.num_epochs


def test_loss_section_is_the_named_loss():
    assert build_config({"loss": {"name": "simclr", "temperature": 0.1}}).loss.temperature == 0.1
    with pytest.raises(ConfigError, match=r"unknown key loss.negative"):
        build_config({"loss": {"name": "simclr", "negative": "exp"}})


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"optim": {"bas_lr": 1}}, ["unknown key optim.bas_lr", "base_lr"]),
        ({"otim": {}}, ["unknown key otim", "optim"]),
        ({"zzz": 1}, ["unknown key zzz", "known here", "data"]),
        ({"loss": {"negativ": "exp"}}, ["unknown key loss.negativ", "negative"]),
        ({"optim": {"base_lr": "fast"}}, ["optim.base_lr", "'fast'"]),
        ({"train": {"zero_stage": 7}}, ["train.zero_stage", "7"]),
        ({"train": {"num_epochs": 0}}, ["train.num_epochs must be in [1, 1e6]"]),
        ({"loss": {"temperature_positive": 0}}, ["loss.temperature_positive"]),
        ({"loss": {"name": "nope"}}, ["loss", "nope"]),
        ({"views": {"override": {"flip": 1}}}, ["views.override", "flip_p"]),
        ({"train": 3}, ["train", "3"]),
        ({"views": {"recipe": "nope"}}, ["views.recipe", "byol, ", ".yaml"]),
        ({"views": {"specs": [{"flip": 1}]}}, ["views.specs.0", "flip_p"]),
        ({"views": {"specs": [{}, {"size_px": 0}]}}, ["views.size_px", "0"]),
        ({"views": {"specs": [{}]}}, ["views.recipe", "at least two views", "has 1"]),
        ({"views": {"recipe": "multicrop"}, "loss": {"name": "siglip"}}, ["views.recipe", "siglip", "has 8"]),
        ({"views": {"recipe": "multicrop"}, "loss": {"name": "spectral"}}, ["views.recipe", "two views", "spectral"]),
        ({"views": {"recipe": "multicrop"}, "loss": {"name": "dclw"}}, ["views.recipe", "two views", "dclw"]),
        ({"model": {"projector_dim": 100_000}, "loss": {"name": "minc"}}, ["model.projector_dim", "minc", "40.0 GB"]),
        ({"model": {"projector_dim": 20_000}, "loss": {"name": "vicreg"}}, ["model.projector_dim: 20000", "16384"]),
        ({"loss": {"name": "minc", "scale": 0}}, ["loss.scale must be in [1e-6, 1e6]"]),
        ({"loss": {"name": "byol", "target_momentum": 1.5}}, ["loss.target_momentum must be in [0, 1], not 1.5"]),
        ({"data": {"global_batch_size": 1}, "loss": {"name": "byol"}}, ["data.global_batch_size must be >= 2"]),
        ({"loss": {"name": "simsiam", "target_momentum": 0.9}}, ["unknown key loss.target_momentum"]),
        (
            {"train": {"zero_stage": 1}, "optim": {"name": "lamb", "impl": "apex"}},
            ["train.zero_stage must be 0", "optim.impl=apex", "optim.name=lamb"],
        ),
        (
            {"train": {"zero_stage": 1, "offload_optimizer": True}, "optim": {"impl": "apex"}},
            ["train.offload_optimizer must be false", "optim.impl=apex"],
        ),
        ({"optim": {"name": "lars", "impl": "apex"}}, ["optim.impl must be auto or torch", "optim.name=lars"]),
        ({"optim": {"name": "lamb", "impl": "apex", "weight_decay": 0}}, ["optim.weight_decay", "optim.name=lamb"]),
        ({"optim": {"impl": "cuda"}}, ["optim.impl", "'cuda'", "apex"]),
        ({"optim": {"name": "adam"}}, ["optim.name", "'adam'", "lamb"]),
        ({"model": {"layer_norm": "fused"}}, ["model.layer_norm", "'fused'", "apex"]),
    ],
)
def test_bad_values_name_the_key_in_one_line(tree, parts):
    with pytest.raises(ConfigError) as caught:
        build_config(tree)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_recipe_file_goes_into_the_config(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("views:\n- {size_px: 48, blur_sigma: [0.2, 1.0]}\n- {size_px: 24, flip_p: 0}\n")
    cfg = build_config({"views": {"recipe": str(recipe)}})
    recipe.unlink()
    assert build_config(to_dict(cfg)) == cfg
    assert cfg.views.recipe == "mine"
    assert build_view_specs(cfg.views) == (ViewSpec(size_px=48, blur_sigma=(0.2, 1.0)), ViewSpec(size_px=24, flip_p=0))


@pytest.mark.parametrize("text", ["- {size_px: 48}", "views: 3", "views: [3]", "views: []\nmean: 3"])
def test_a_recipe_file_that_is_none(text, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml must hold"):
        build_config({"views": {"recipe": str(recipe)}})
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.yaml"):
        build_config({"views": {"recipe": str(tmp_path / "none.yaml")}})


def test_bad_files_name_the_path(tmp_path):
    with pytest.raises(ConfigError, match=r"missing.yaml"):
        load_config(tmp_path / "missing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad.yaml is not YAML"):
        load_config(bad)
    bad.write_text("optim: {base_lr: 1}\noptim: {momentum: 0}")
    with pytest.raises(ConfigError, match="optim stands twice"):
        load_config(bad)
    bad.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(bad)
    bad.write_text("{}")
    with pytest.raises(ConfigError, match="key=value"):
        load_config(bad, ["oops"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_the_round_trip(path):
    cfg = load_config(path)
    assert build_config(yaml.safe_load(yaml.safe_dump(to_dict(cfg)))) == cfg


def test_differing_keys_are_named():
    old = to_dict(Config())
    new = to_dict(dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, base_lr=9.0)))
    assert differing_keys(old, new) == [f"optim.base_lr: {Config().optim.base_lr} -> 9.0"]
    assert differing_keys(old, new, ignore=("optim.base_lr",)) == []


def test_later_files_replace_keys_and_sections_of_another_name(tmp_path):
    parts = {
        "data": "data: {global_batch_size: 64, engine: resident}\nloss: {name: byol, target_momentum: 0.9}\n",
        "loss": "loss: {name: mio, negative: jensen}\noptim: {name: sgd, base_lr: 0.1}\n",
        "change": "loss: {temperature_negative: 0.3}\ndata: {global_batch_size: 32}\noptim: {name: sgd, momentum: 0}\n",
    }
    paths = []
    for name, text in parts.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(text)
    cfg = load_config(paths, ["optim.base_lr=0.2"])
    assert (cfg.data.global_batch_size, cfg.data.engine) == (32, "resident")
    assert cfg.loss == MioConfig(negative="jensen", temperature_negative=0.3)
    assert (cfg.optim.base_lr, cfg.optim.momentum) == (0.2, 0)
    paths[0].write_text("loss: {negative: jensen}\n")  # of MIO, the default
    assert load_config([paths[0], paths[1], paths[2]]).loss.negative == "jensen"
    paths[0].write_text("loss: {name: byol}\n")
    paths[1].write_text("loss: {negative: jensen}\n")  # a key of MIO in BYOL's section
    with pytest.raises(ConfigError, match=r"unknown key loss\.negative"):
        load_config(paths[:2])


def test_overrides_are_a_mapping_or_texts(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("optim: {name: sgd}\n")
    changes = {"train.num_epochs": np.int64(20), "run.dir": tmp_path, "optim.betas": [0.8, 0.9], "data.test": None}
    cfg = load_config(path, changes)
    assert (cfg.train.num_epochs, cfg.run.dir, cfg.optim.betas) == (20, str(tmp_path), (0.8, 0.9))
    with pytest.raises(ConfigError, match=r"not the text 'run\.dir=a'"):
        load_config(path, "run.dir=a")


def test_keys_that_may_change_on_resume_are_declared_where_they_are_defined():
    keys = free_keys()
    assert len(keys) == len(set(keys)) == 33
    assert {"run.dir", "data.num_workers", "data.cache_dir", "train.compile"} <= set(keys)
    assert "model.activation_checkpointing" in keys
    assert not {"run.seed", "data.global_batch_size", "train.precision", "loss.name", "optim.base_lr"} & set(keys)


def test_every_number_has_an_interval_that_holds_its_default():
    sections = [hint for hint in typing.get_type_hints(Config).values() if dataclasses.is_dataclass(hint)]
    sections += [config for config, _ in LOSSES.values()] + [ViewSpec, EvalViewSpec]
    for section in sections:
        section()
        for item in dataclasses.fields(section):
            hint = typing.get_type_hints(section)[item.name]
            is_number = hint in (int, float) or re.search(r"\b(int|float)\b", str(hint)) is not None
            assert bool(item.metadata.get("within")) == is_number, f"{section.__name__}.{item.name}"


def test_a_number_with_an_exponent_is_a_number_and_a_text_stays_a_text(tmp_path):
    cfg = build_config({})
    path = tmp_path / "x.yaml"
    path.write_text("optim: {base_lr: 1e-3, weight_decay: 1E-5}\nds: {gradient_predivide_factor: 2e0}\n")
    read = load_config(path, ["optim.final_lr_fraction=5e-1"])
    assert (read.optim.base_lr, read.optim.weight_decay, read.optim.final_lr_fraction) == (1e-3, 1e-5, 0.5)
    assert read.ds == {"gradient_predivide_factor": 2.0}
    for text in ("1e5", "10", "1:30", "true", "null", "2024-01-01", "=", "<<", "a: b", "\u00e9\U0001f600", " ", "#"):
        named = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=text))
        path.write_text(dump_yaml(to_dict(named)), encoding="utf-8")
        assert load_config(path) == named
        assert load_config(path, {"run.dir": text, "optim.betas": (np.float64(0.5), 0.5)}).run.dir == text


@pytest.mark.parametrize("value", [object(), 10**5000, {(1, 2): 3}, b"x"], ids=lambda value: type(value).__name__)
def test_what_no_configuration_holds_is_refused_from_python_too(tmp_path, value):
    with pytest.raises(ConfigError, match=r"^(run|the configuration)"):
        build_config({"run": {"dir": value}})
    (tmp_path / "x.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"^run\.dir"):
        load_config(tmp_path / "x.yaml", {"run.dir": value})


def test_an_alias_is_a_copy(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: {backbone_kwargs: &a {}}\nds: *a\nviews: {specs: [&b {size_px: 48}, *b]}\n")
    cfg = load_config(path, ["ds.dump_state=true"])
    assert (cfg.model.backbone_kwargs, cfg.ds) == ({}, {"dump_state": True})
    assert build_view_specs(cfg.views) == (ViewSpec(size_px=48),) * 2
