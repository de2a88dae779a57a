"""Exports load in stock libraries and compute the encoder's features; their cards say what the run was."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastssl.checkpoint.checksums import save_file
from fastssl.checkpoint.save_load import load_weights
from fastssl.encoder import load_encoder
from fastssl.errors import UserError
from fastssl.export.export_encoder import FORMATS, WEIGHTS, export_encoder
from fastssl.export.stock_models import find_stock_model, random_images
from fastssl.models.config import ModelConfig
from pipelines.preprocessing import describe_preprocessing, views_from
from tests.helpers.processes import ROOT, run_program_forked


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A trained and evaluated run of a model that timm has, at 32 px."""
    from fastssl.cli import main

    folder = tmp_path_factory.mktemp("exported") / "a_*run*"
    settings = [
        f"data.train={digits / 'train.beton'}", f"data.test={digits / 'test.beton'}", f"run.dir='{folder}'",
        "views={recipe: digits, size_px: 32, eval_crop_fraction: .9}", "data.global_batch_size=256",
        "model={backbone: timm/resnet18, backbone_kwargs: {channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}}",
        "optim.warmup_epochs=0", "train.num_epochs=1", "run.num_threads=1", "eval={what: [knn], knn_k: 20}",
    ]  # fmt: skip
    config = folder.parent / "empty.yaml"
    config.write_text("{}")
    assert main(["train", "--cfg", str(config), "--set", *settings]) == 0
    assert main(["eval", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def encoder(run):
    return load_encoder(run)


def assert_same_features(encoder, module):
    images = random_images(encoder)
    with torch.inference_mode():
        torch.testing.assert_close(module.eval()(images), encoder(images), rtol=0, atol=1e-5)


def test_timm_loads_it_strictly(run, encoder, tmp_path):
    import timm
    from safetensors.torch import load_file

    out = export_encoder(run, "timm", tmp_path / "out")
    module = timm.create_model("resnet18", num_classes=0, channels=[8, 8, 16, 16], layers=[1, 1, 1, 1])
    module.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    assert_same_features(encoder, module)


def test_timm_loads_the_folder_of_the_hub_form(run, encoder, tmp_path):
    import timm

    out = export_encoder(run, "hf", tmp_path / "out")
    module = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_same_features(encoder, module)
    cfg = timm.data.resolve_model_data_config(module)
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (encoder.transform.mean, encoder.transform.std)
    assert (list(cfg["input_size"]), cfg["crop_pct"], cfg["interpolation"]) == ([3, 32, 32], 0.9, "bilinear")


def test_torchvision_loads_it_strictly(tmp_path):
    from torchvision import models

    torch.manual_seed(2)
    stock = models.resnet18()
    stock.fc = torch.nn.Identity()
    path = tmp_path / "weights.pt"
    given = {"backbone": stock.state_dict(), "projector": {}, "model": {"backbone": "resnet18"}, "image_px": 64}
    save_file(given, path)
    # Weights alone have no configuration above them: it is that of a run.
    (tmp_path / "config.yaml").write_text("{run: {dir: x}, views: {size_px: 64}}")
    out = export_encoder(path, "torchvision", tmp_path / "out")
    module = models.resnet18()
    module.fc = torch.nn.Identity()
    module.load_state_dict(torch.load(out / "model.pth", weights_only=True), strict=True)
    assert_same_features(load_encoder(path), module)
    assert "Not evaluated" in (out / "README.md").read_text()
    timm_out = export_encoder(path, "timm", tmp_path / "timm")  # timm has the same model
    assert (timm_out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "inside", [pytest.param(False, marks=pytest.mark.slow, id="prepared images"), pytest.param(True, id="whole images")]
)
def test_onnxruntime_computes_the_same(inside, run, encoder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = export_encoder(run, "onnx", tmp_path / "out", preprocess_inside=inside)
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    if not inside:
        images = random_images(encoder, 7)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), encoder(images).detach(), rtol=0, atol=1e-5)
        return
    rng = np.random.default_rng(0)
    for shape in ((50, 80, 3), (300, 200, 3), (9, 33, 3)):  # larger and smaller than a view
        image = rng.integers(0, 256, shape, np.uint8)
        (found,) = session.run(None, {"image": image})
        wanted = encoder(encoder.transform(image)[None]).detach()
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=5e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("format", [each for each in FORMATS if each not in ("torchvision", "onnx")])
def test_a_card_says_what_the_run_was_and_stays_text(format, run, tmp_path):
    out = export_encoder(run, format, tmp_path / "out")
    assert {path.name for path in out.iterdir()} >= {WEIGHTS[format], "README.md", "preprocessing.json"}
    card = (out / "README.md").read_text()
    row = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    for part in (f"{100 * row['top1']:.1f}", "1,297 from train.beton", "mio", "to fill in", "digits", r"a\_\*run\*"):
        assert part in card
    about = json.loads((out / "preprocessing.json").read_text())
    assert about == load_weights(run)["preprocessing"] == describe_preprocessing(views_from(about))
    assert (about["size_px"], about["crop_fraction"]) == (32, 0.9)
    assert "square of 0.9 of the shorter side" in card


def test_a_card_names_no_folder_of_this_machine(run, digits, tmp_path):
    card = (export_encoder(run, "safetensors", tmp_path / "out") / "README.md").read_text()
    assert "test.beton" in card
    assert "backbone: timm/resnet18" in card
    for folder in (digits, run.parent, tmp_path):
        assert str(folder) not in card


def test_an_edited_line_of_results_is_left_out(run, tmp_path, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    row = json.loads((copy / "eval.jsonl").read_text().splitlines()[-1])
    edited = [
        row | {"name": "words", "top1": "high"},
        row | {"name": "words", "top1": True},
        row | {"name": "words", "interval95_test_images": [0.1]},
        row | {"name": "words", "interval95_test_images": None},
        row | {"name": "words", "interval95_test_images": [0.1, float("nan")]},
    ]
    odd = row | {"name": ["a", {}], "scored_on": "3 of elsewhere/x.beton", "test": 1}
    with (copy / "eval.jsonl").open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in [*edited, odd]) + "not a row\n")
    (copy / "environment.json").write_text('{"packages": 1, "gpus": [1], "world_size": "|"}')
    card = (export_encoder(copy, "safetensors", tmp_path / "out") / "README.md").read_text()
    assert f"{100 * row['top1']:.1f}" in card
    assert "words" not in card
    assert "3 of x.beton" in card
    assert "skipped what is not a row" in capfd.readouterr().err


def test_the_cards_lines_of_python_run(run, tmp_path):
    out = export_encoder(run, "timm", tmp_path / "out")
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    stock = "from pipelines.torchvision_operators import declare_torchvision_operators as declare\ndeclare()\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", stock + code], cwd=tmp_path, env=environment, check=True)


def test_a_model_that_no_library_has_names_the_formats_that_take_it(encoder):
    changed = ModelConfig(backbone="resnet18", stem="cifar")
    with pytest.raises(UserError, match=r"model\.stem.*onnx or safetensors"):
        find_stock_model("torchvision", changed, encoder)
    with pytest.raises(UserError, match="no model named"):
        find_stock_model("torchvision", replace(changed, backbone="timm/convnextv2_atto", stem="imagenet"), encoder)


def test_nothing_is_replaced_or_left_half_written(run, tmp_path):
    out = tmp_path / "out"
    export_encoder(run, "safetensors", out)
    with pytest.raises(UserError, match="--overwrite"):
        export_encoder(run, "safetensors", out)
    export_encoder(run, "hf", out, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(UserError, match="not the folder of an export"):
        export_encoder(run, "hf", mine, overwrite=True)
    with pytest.raises(UserError, match="inside is for onnx"):
        export_encoder(run, "hf", tmp_path / "other", preprocess_inside=True)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot be written"):
        export_encoder(run, "safetensors", file / "out")
    with pytest.raises(UserError, match="has no name"):
        export_encoder(run, "safetensors", ".", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]
    assert load_weights(run)["backbone"].keys()


@pytest.mark.parametrize("other", [".git/config", "notes.txt", "README.md/x"])
def test_a_folder_with_other_files_is_not_replaced(other, run, tmp_path):
    out = export_encoder(run, "safetensors", tmp_path / "out")
    (out / "README.md").unlink()
    (out / other).parent.mkdir(exist_ok=True)
    (out / other).write_text("mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=f"also holds what no export writes \\({other.split('/')[0]}\\)"):
        export_encoder(run, "hf", out, overwrite=True)
    assert sorted(out.rglob("*")) == before
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(UserError, match="not the folder of an export"):
        export_encoder(run, "hf", link, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


_KILLED = """
import os, sys
from pathlib import Path
rename, sought = Path.rename, int(sys.argv[3])
num = 0
def counted(self, target):
    global num
    num += 1
    if num == sought:
        os._exit(9)
    return rename(self, target)
Path.rename = counted
from fastssl.export import export_encoder
delete = export_encoder._delete_export
def killed(folder):
    if num == 2 and sought == 3 and folder.is_dir():
        os._exit(9)
    delete(folder)
export_encoder._delete_export = killed
export_encoder.export_encoder(sys.argv[1], "hf", sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("at", [1, 2, 3], ids=["old aside", "new in", "old deleted"])
def test_a_kill_during_the_replacement_loses_nothing(at, run, tmp_path, tmp_path_factory):
    out = export_encoder(run, "safetensors", tmp_path / "out")
    card = out / "README.md"
    card.write_text("edited")
    done = run_program_forked(_KILLED, [str(run), str(out), str(at)], tmp_path_factory.mktemp("forked"))
    assert done.returncode == 9, done.stderr
    assert "edited" in [path.read_text() for path in tmp_path.glob("*/README.md")]
    with pytest.raises(UserError, match="exists"):  # whole again: the old one, or the new one
        export_encoder(run, "safetensors", out)
    assert (card.read_text() == "edited") == (at < 3)
    export_encoder(run, "safetensors", out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "edited" not in card.read_text()


def test_weights_of_another_version_are_one_line(run, tmp_path):
    weights = load_weights(run)
    weights["model"] |= {"shape_of_tomorrow": 1}
    save_file(weights, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt is of another version of fastssl.*shape_of_tomorrow"):
        export_encoder(tmp_path / "weights.pt", "safetensors", tmp_path / "out")
    del weights["preprocessing"]
    save_file(weights, tmp_path / "weights.pt")
    shutil.copy(run / "config.yaml", tmp_path)
    assert (export_encoder(tmp_path / "weights.pt", "safetensors", tmp_path / "out") / "README.md").is_file()


def test_as_json(run, tmp_path, capfd):
    from fastssl.cli import main

    assert main(["export", str(run), str(tmp_path / "out"), "--format", "safetensors", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    files = ["README.md", "model.safetensors", "preprocessing.json"]
    assert found == {"out": str(tmp_path / "out"), "format": "safetensors", "files": files}


@pytest.fixture
def small_disk(tmp_path):
    """A folder with 16 KiB of space."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "torchvision"])  # which has no such model
def test_a_full_disk_leaves_nothing_half_written(format, run, small_disk):
    if format == "onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match=r"out cannot be written \(.*No space left"):
        export_encoder(run, format, small_disk / "out")
    assert not list(small_disk.iterdir())
