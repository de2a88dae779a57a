"""Which settings are chosen for which images and machine, and that each choice is a valid configuration."""

from dataclasses import replace

import pytest
import yaml

from fastssl.config import load_config
from fastssl.plan.choices import as_yaml, choose, expectation, with_batch_size
from fastssl.plan.facts import Facts, read_facts
from fastssl.plan.initial_weights import InitialWeights
from fastssl.plan.make_plan import value_of
from tests.helpers.fault_server import FaultServer
from tests.helpers.shards import write_pictures

CPU = Facts(
    num_images=5_000,
    short_side_px=375,
    is_one_size=False,
    decoded_bytes=2 << 30,
    file_bytes=300 << 20,
    num_classes=0,
    device="cpu",
    memory_bytes=16 << 30,
    gpu_memory_bytes=0,
    num_cores=2,
    num_free_cores=2,
    num_processes=1,
    has_dali=False,
)
GPU = replace(CPU, device="cuda", gpu_memory_bytes=80 << 30, num_images=200_000, decoded_bytes=100 << 30, has_dali=True)


def chosen(facts, **options):
    return {each.key: each.value for each in choose(facts, **options)}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (CPU, {"views.size_px": 64, "model.backbone": "resnet18", "data.engine": "ffcv", "train.precision": "fp32"}),
        (replace(CPU, short_side_px=32), {"views.size_px": 32, "model.stem": "cifar", "views.recipe": "mio_small"}),
        (GPU, {"views.size_px": 224, "model.backbone": "resnet50", "data.engine": "dali", "train.precision": "bf16"}),
        (replace(GPU, num_images=9_000), {"model.backbone": "resnet18", "views.recipe": "byol"}),
        (replace(GPU, has_dali=False), {"data.engine": "ffcv"}),
        (replace(GPU, is_one_size=True, decoded_bytes=1 << 30), {"data.engine": "resident"}),
        (replace(GPU, short_side_px=96), {"views.size_px": 96, "model.stem": "no_pool", "views.recipe": "mio_small"}),
        (replace(GPU, num_processes=4), {"data.global_batch_size": 1024}),
        (replace(CPU, file_bytes=20 << 30), {"data.order": "quasi_random"}),
        (replace(CPU, num_free_cores=1), {"run.num_threads": 1}),
        (replace(CPU, num_images=230), {"data.global_batch_size": 32}),
        (replace(CPU, num_images=2), {"data.global_batch_size": 2}),
    ],
)
def test_choices(facts, expected):
    assert chosen(facts) | expected == chosen(facts)


@pytest.mark.parametrize("facts", [CPU, GPU, replace(CPU, short_side_px=32), replace(GPU, short_side_px=64)])
def test_each_choice_is_a_valid_configuration_with_a_reason(facts, tmp_path):
    choices = choose(facts)
    path = tmp_path / "start.yaml"
    path.write_text(as_yaml(choices, ["A header."]))
    cfg = load_config(path, ["train.num_epochs=20", "optim.warmup_epochs=2"])
    assert (cfg.model.backbone, cfg.data.global_batch_size) == (
        value_of(choices, "model.backbone"),
        value_of(choices, "data.global_batch_size"),
    )
    assert all(each.why for each in choices)
    assert path.read_text().startswith("# A header.\n")


def test_reasons_and_names_with_odd_characters_stay_in_their_place(tmp_path):
    size = choose(CPU)[0]
    choices = [size, replace(size, key="run.dir", value="a: #b\nc", why="for\nmany: # reasons")]
    assert yaml.safe_load(as_yaml(choices, [])) == {"views": {"size_px": 64}, "run": {"dir": "a: #b\nc"}}


@pytest.mark.parametrize("num_images", [2, 3, 7, 8, 31, 100, 255, 1_000, 10**6])
@pytest.mark.parametrize("num_processes", [1, 3, 8])
def test_a_batch_is_shared_evenly_and_fits_the_images(num_images, num_processes):
    batch = chosen(replace(GPU, num_images=num_images, num_processes=num_processes))["data.global_batch_size"]
    assert batch % num_processes == 0
    assert batch >= 2
    assert batch <= max(num_images // 4 + num_processes, 2 * num_processes)


def test_initial_weights_bring_their_model_and_a_lower_learning_rate():
    weights = InitialWeights(path="init.pt", model={"backbone": "timm/vit"}, size_px=224, mean=(0.5, 0.5, 0.5))
    found = chosen(CPU, weights=weights)
    assert found["run.init_from"] == "init.pt"
    assert (found["model.backbone"], found["views.size_px"], found["views.mean"]) == ("timm/vit", 224, [0.5, 0.5, 0.5])
    assert found["optim.base_lr"] == pytest.approx(0.02)
    assert "model.stem" not in found


def test_another_batch_size_comes_with_its_reason():
    choices = with_batch_size(choose(CPU), 16, "because")
    assert [(each.value, each.why) for each in choices if each.key == "data.global_batch_size"] == [(16, "because")]


def test_what_to_expect():
    assert "too few" in expectation(replace(CPU, num_images=200), has_initial_weights=False)
    assert "few" in expectation(CPU, has_initial_weights=False)
    assert expectation(replace(CPU, num_images=200), has_initial_weights=True) is None
    assert expectation(GPU, has_initial_weights=False) is None


def test_the_facts_of_many_shards_come_from_some_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    monkeypatch.setattr("fastssl.plan.facts._MOST_SIZES", 4)
    monkeypatch.setattr("fastssl.plan.facts._BUSY_S", 0.01)
    folder = tmp_path / "set"
    write_pictures(folder, px=40)
    with FaultServer(folder) as server:
        found = read_facts(server.url, device="cpu")
        rows = [each for each in server.requests if each.path.endswith(".rows")]
        assert (len(rows), len(server.requests)) == (4, 5)  # and the manifest
    assert found == replace(
        read_facts(folder, device="cpu"), memory_bytes=found.memory_bytes, num_free_cores=found.num_free_cores
    )
    assert (found.num_images, found.short_side_px, found.is_one_size, found.num_classes) == (24, 40, True, 2)
    assert found.decoded_bytes == 24 * 40 * 44 * 3
    assert found.is_sharded
    assert next(each.value for each in choose(found) if each.key == "data.order") == "lanes"
