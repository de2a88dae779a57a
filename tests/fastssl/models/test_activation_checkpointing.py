"""Recomputed activations change nothing but the memory, and leave the model's names alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastssl.models.activation_checkpointing import checkpoint_activations
from fastssl.models.backbones import build_backbone
from fastssl.models.config import ModelConfig
from fastssl.models.grad_cache import unchanged_buffers
from tests.helpers.live_memory import PeakBytes

NARROW = {"channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4}
TIMM_TINY = NARROW | {"layers": [2, 1, 1, 1], "zero_init_last": False, "drop_path_rate": 0.5}


def torchvision_vit() -> nn.Module:
    from torchvision import models

    return models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.5)


def torchvision_swin() -> nn.Module:
    from torchvision import models

    return models.SwinTransformer([2, 2], 8, [1, 1], [1, 1], [2, 2], stochastic_depth_prob=0.5)


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)])


def of_config(name: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: build_backbone(ModelConfig(backbone=name, **fields), image_px=32)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": of_config("resnet18", stem="cifar"),
    "timm/resnet18": of_config("timm/resnet18", stem="cifar", backbone_kwargs=TIMM_TINY),
    "timm/mobilenetv3_small_050": of_config("timm/mobilenetv3_small_050"),
    "efficientnet_b0": of_config("efficientnet_b0"),
    "vit": torchvision_vit,
    "swin": torchvision_swin,
    "convnext": torchvision_convnext,
}


def build(name: str, *, checkpointed: bool) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if checkpointed:
        checkpoint_activations(model, name)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    h = model(torch.randn(4, 3, 32, 32))
    with unchanged_buffers(model):
        h.square().mean().backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers()) | {"h": h.detach()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "efficientnet_b0" else name for name in MODELS]
)
def test_gradients_and_statistics_are_the_same_bit_for_bit(name: str) -> None:
    plain, checkpointed = build(name, checkpointed=False), build(name, checkpointed=True)
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(checkpointed.state_dict())
    expected, found = step(plain), step(checkpointed)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(plain.eval()(images), checkpointed.eval()(images))


def test_less_is_held() -> None:
    images = torch.randn(16, 3, 32, 32)

    def peak_bytes(*, checkpointed: bool) -> int:
        kwargs = NARROW | {"layers": [6, 1, 1, 1]}
        model, _ = build_backbone(ModelConfig(backbone="timm/resnet18", stem="cifar", backbone_kwargs=kwargs), 32)
        if checkpointed:
            checkpoint_activations(model, "timm/resnet18")
        with PeakBytes() as memory:
            model(images).sum().backward()
        return memory.peak

    plain, least = peak_bytes(checkpointed=False), peak_bytes(checkpointed=True)
    assert plain > 4e6
    assert least < 0.5 * plain


@pytest.mark.parametrize(
    ("name", "words"), [("vgg11", "vgg11 does not support it"), ("timm/inception_v3", "timm does not support it")]
)
def test_models_that_cannot_are_named(name: str, words: str) -> None:
    model = nn.Sequential() if name == "vgg11" else _timm_model_without()
    with pytest.raises(ValueError, match=rf"^model.activation_checkpointing: .*{words}"):
        checkpoint_activations(model, name)


def _timm_model_without() -> nn.Module:
    import timm

    return timm.create_model("convit_tiny", num_classes=0)
