"""Initial weights of other libraries and files become a file that a run starts from."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from fastssl.checkpoint.save_load import load_weights
from fastssl.errors import UserError
from fastssl.plan.initial_weights import prepare_initial_weights


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(1)
    return models.resnet18()


def prepared(init, tmp_path, backbone="resnet18"):
    return prepare_initial_weights(str(init), tmp_path / "init.pt", backbone=backbone)


def assert_holds(path, model):
    stored = load_weights(path)["backbone"]
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)


def test_torchvision_takes_what_is_in_its_cache(resnet, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.ResNet18_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[-1]
    cached.parent.mkdir(parents=True)
    torch.save(resnet.state_dict(), cached)
    found = prepared("torchvision", tmp_path)
    assert found.model == {"backbone": "resnet18"}
    assert_holds(found.path, resnet)


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "safetensors", "ddp"])
def test_a_state_dict_of_the_named_model(wrapping, resnet, tmp_path):
    state = {name: value.contiguous() for name, value in resnet.state_dict().items()}
    path = tmp_path / ("w.safetensors" if wrapping == "safetensors" else "w.pth")
    if wrapping == "safetensors":
        save_file(state, path)
    elif wrapping == "ddp":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapping == "state_dict" else state, path)
    assert_holds(prepared(path, tmp_path).path, resnet)


def test_weights_of_another_model_say_how_to_name_theirs(resnet, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(resnet.state_dict(), path)
    with pytest.raises(UserError, match=r"does not fit resnet50.*model\.backbone"):
        prepared(path, tmp_path, backbone="resnet50")
    assert not (tmp_path / "init.pt").exists()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("nothing.pth", "torchvision, torchvision:NAME"),
        ("timm:", "needs the name"),
        ("timm:no_such_model", "no_such_model"),
        ("torchvision:resnet81", "resnet18"),
    ],
)
def test_no_such_weights(init, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepared(init, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 a broken archive"])
def test_a_file_of_something_else(content, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as weights"):
        prepared(path, tmp_path)
    text = tmp_path / "w.txt"
    text.write_bytes(content)
    with pytest.raises(UserError, match="ends in"):
        prepared(text, tmp_path)


def test_an_unpickling_of_objects_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": ValueError("an object")}, path)
    with pytest.raises(UserError, match="cannot be read as weights"):
        prepared(path, tmp_path)
