"""Learning rates by layer."""

import pytest
from torch import nn

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.finetune import parameter_groups
from fastssl.models.backbones import build_backbone
from fastssl.models.config import ModelConfig

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "num_layers", "first"),
    [
        (ModelConfig(backbone="resnet18"), 2 + 8 + 1, "conv1.weight"),  # convolution, norm, eight blocks
        (ModelConfig(backbone="timm/vit_tiny_patch16_224", backbone_kwargs=VIT), 1 + 2 + 1 + 1, "cls_token"),
    ],
    ids=["resnet18", "vit"],
)
def test_rates_fall_from_the_classifier_to_the_first_layer(model, num_layers, first):
    encoder, num_features = build_backbone(model, 16)
    whole = nn.Sequential(encoder, nn.Linear(num_features, 3))
    groups = parameter_groups(whole, 0.5, EvalConfig(finetune_layer_decay=0.8, finetune_weight_decay=0.3))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    parameters = dict(whole.named_parameters())
    assert len(settings) == sum(len(group["params"]) for group in groups) == len(parameters)  # each once
    assert settings[id(parameters["1.weight"])] == (0.5, 0.3)
    assert settings[id(parameters["1.bias"])] == (0.5, 0.0)
    assert settings[id(parameters[f"0.{first}"])][0] == pytest.approx(0.5 * 0.8 ** (num_layers - 1))
    assert len({lr for lr, _ in settings.values()}) == num_layers
    assert all((decay == 0.0) == (p.ndim <= 1) for p, (_, decay) in ((p, settings[id(p)]) for p in whole.parameters()))


def test_without_decay_there_is_one_rate():
    encoder, num_features = build_backbone(ModelConfig(backbone="resnet18"), 32)
    groups = parameter_groups(nn.Sequential(encoder, nn.Linear(num_features, 3)), 0.5, EvalConfig())
    assert {group["lr"] for group in groups} == {0.5}
