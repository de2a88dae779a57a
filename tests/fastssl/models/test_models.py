"""Encoders keep their models' weights and names; the two-view model batches views; the average moves."""

import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastssl.models.backbones import build_backbone
from fastssl.models.config import ModelConfig
from fastssl.models.ema import Ema
from fastssl.models.two_view import TwoViewModel

TINY = {"channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4, "layers": [1, 1, 1, 1]}


def _tiny(**fields) -> ModelConfig:
    return ModelConfig(backbone="timm/resnet18", stem="cifar", backbone_kwargs=TINY, **fields)


def _plain(name: str) -> nn.Module:
    if not name.startswith("timm/"):
        import torchvision

        return torchvision.models.get_model(name, weights=None)
    import timm

    return timm.create_model(name.removeprefix("timm/"))


@pytest.mark.parametrize(
    ("name", "image_px"),
    [
        ("resnet18", 32),
        ("mobilenet_v3_small", 32),
        ("squeezenet1_0", 64),
        ("vit_b_16", 224),
        ("timm/resnet18", 32),
        ("timm/mobilenetv3_small_050", 32),
        ("timm/vit_tiny_patch16_224", 224),
    ],
)
def test_weights_go_back_into_the_plain_model(name, image_px):
    if name == "squeezenet1_0":
        with pytest.raises(ValueError, match="squeezenet1_0 has no linear classifier"):
            build_backbone(ModelConfig(backbone=name), image_px)
        return
    backbone, num_features = build_backbone(ModelConfig(backbone=name), image_px)
    plain = _plain(name)
    left = plain.load_state_dict(backbone.state_dict(), strict=False)
    assert left.unexpected_keys == []
    assert len(left.missing_keys) <= 2, "only the classifier's weight and bias may be missing"
    classifier = plain.get_submodule(left.missing_keys[0].rpartition(".")[0])
    seen = []
    classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, image_px, image_px)
    with torch.no_grad():
        plain.eval()(images)
        h = backbone.eval()(images)
    assert h.shape == (2, num_features)
    torch.testing.assert_close(h, seen[0])


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_cifar_stem_keeps_the_resolution(name):
    backbone, num_features = build_backbone(ModelConfig(backbone=name, stem="cifar"), image_px=32)
    shapes = []
    backbone.get_submodule("layer1").register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    backbone(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 64, 32, 32)]
    assert backbone.get_submodule("conv1").weight.shape == (64, 3, 3, 3)
    assert num_features == 512


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_no_pool_stem_halves_the_resolution_once(name):
    backbone, _ = build_backbone(ModelConfig(backbone=name, stem="no_pool"), image_px=32)
    shapes = []
    backbone.get_submodule("layer1").register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    backbone(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 64, 16, 16)]
    assert backbone.get_submodule("conv1").weight.shape == (64, 3, 7, 7)


def test_cifar_stem_replaces_a_deep_stem_at_its_width():
    backbone, num_features = build_backbone(_tiny(), image_px=16)
    assert backbone.get_submodule("conv1").weight.shape == (8, 3, 3, 3)
    assert num_features == 16


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_pool_averages_quadrants(name):
    cfg = ModelConfig(backbone=name, stem="cifar", pool_px=2)
    backbone, num_features = build_backbone(cfg, image_px=32)
    assert num_features == 4 * 512
    maps = []
    backbone.get_submodule("layer4").register_forward_hook(lambda module, args, out: maps.append(out))
    h = backbone(torch.randn(2, 3, 32, 32)).view(2, 512, 2, 2)
    torch.testing.assert_close(h[:, :, 0, 1], maps[0][:, :, :2, 2:].mean((2, 3)))


def test_resnet50_of_twice_the_width_has_twice_the_channels_everywhere():
    name, channels = "timm/resnet50", [128, 256, 512, 1024]
    wide = ModelConfig(backbone=name, stem_channels=128, backbone_kwargs={"channels": channels})
    (backbone, num_features), (plain, _) = (build_backbone(cfg, 64) for cfg in (wide, ModelConfig(backbone=name)))
    assert num_features == 4096
    ours, theirs = (dict(model.named_parameters()) for model in (backbone, plain))
    assert list(ours) == list(theirs)
    for key, weight in ours.items():
        factors = [a // b for a, b in zip(weight.shape, theirs[key].shape, strict=True)]
        assert factors == [2, *[1 if key == "conv1.weight" else 2] * (weight.ndim > 1), *[1] * (weight.ndim - 2)], key


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("resnet18", {}), ("timm/resnet50", {"stem_type": "deep"}), ("timm/resnet50", {"norm_layer": "groupnorm"})],
)
def test_stem_channels_where_they_do_not_fit_are_refused(name, kwargs):
    with pytest.raises(
        ValueError, match=r"model.stem_channels=96: .* needs a single first convolution with batch norm"
    ):
        build_backbone(ModelConfig(backbone=name, stem_channels=96, backbone_kwargs=kwargs), 64)


@pytest.mark.parametrize("fields", [{"stem": "cifar"}, {"stem": "no_pool"}, {"pool_px": 2}, {"stem_channels": 96}])
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm/mobilenetv3_small_050"])
def test_stem_and_pool_are_refused_beyond_resnets(name, fields):
    with pytest.raises(ValueError, match="ResNets only"):
        build_backbone(ModelConfig(backbone=name, **fields), image_px=32)


@pytest.mark.parametrize(("name", "near"), [("resnet81", "resnet18"), ("timm/resnet81", "timm/resnet18")])
def test_unknown_names_get_the_nearest_ones(name, near):
    with pytest.raises(ValueError, match=rf"no model named {name}: did you mean .*{near}"):
        build_backbone(ModelConfig(backbone=name), image_px=32)


def test_names_like_no_other_get_a_hint():
    with pytest.raises(ValueError, match="give a torchvision model"):
        build_backbone(ModelConfig(backbone="qqqqqqqq"), image_px=32)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_unfit_arguments_name_their_key(name):
    with pytest.raises(ValueError, match=r"model\.backbone_kwargs .*nonsense"):
        build_backbone(ModelConfig(backbone=name, backbone_kwargs={"nonsense": 1}), image_px=32)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No server answers, and nothing is cached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return constants


@pytest.mark.parametrize(
    ("name", "asked", "remedy"),
    [
        ("timm/resnet10t", {"pretrained": True}, "pretrained_cfg_overlay: {file: "),
        ("resnet18", {"weights": "DEFAULT"}, "hub/checkpoints"),
    ],
)
def test_pretrained_weights_without_network_fail_at_once(name, asked, remedy, no_network):
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"weights of {name} cannot be loaded .*a local file.*{remedy}"):
        build_backbone(ModelConfig(backbone=name, backbone_kwargs=asked), image_px=32)
    assert time.monotonic() - started < 5  # huggingface_hub's own attempts take a minute
    assert not no_network.HF_HUB_OFFLINE


def test_pretrained_weights_of_a_local_file(tmp_path, no_network):
    import timm

    file = tmp_path / "x.safetensors"
    model = timm.create_model("resnet10t")
    save_file(model.state_dict(), file)
    asked = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    backbone, _ = build_backbone(ModelConfig(backbone="timm/resnet10t", backbone_kwargs=asked), image_px=32)
    assert torch.equal(backbone.layer1[0].conv1.weight, model.layer1[0].conv1.weight)  # pyright: ignore
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.backbone_kwargs .*do not fit"):
        build_backbone(ModelConfig(backbone="timm/resnet10t", backbone_kwargs=asked), image_px=32)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_second_heads_are_refused():
    with pytest.raises(ValueError, match=r"googlenet needs .*aux_logits: false"):
        build_backbone(ModelConfig(backbone="googlenet", backbone_kwargs={"init_weights": False}), image_px=64)
    cfg = ModelConfig(backbone="googlenet", backbone_kwargs={"init_weights": False, "aux_logits": False})
    backbone, num_features = build_backbone(cfg, image_px=64)
    assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, num_features)


def test_an_image_size_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="vit_b_16 does not accept images of 32 px"):
        build_backbone(ModelConfig(backbone="vit_b_16"), image_px=32)


def test_building_leaves_batch_norm_untouched_and_training():
    backbone, _ = build_backbone(_tiny(), image_px=16)
    assert all(module.training for module in backbone.modules())
    assert backbone.state_dict()["bn1.num_batches_tracked"] == 0


def test_two_views_share_one_call():
    model = TwoViewModel(_tiny(), image_px=16)
    calls = []
    model.backbone.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    view_a, view_b = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16) + 3
    h, z = model([view_a, view_b])
    assert calls == [(8, 3, 16, 16)]
    both = model.backbone(torch.cat([view_a, view_b]))
    torch.testing.assert_close(torch.cat(h), both)
    torch.testing.assert_close(torch.cat(z), model.projector(both))
    assert [x.shape for x in z] == [(4, 128), (4, 128)]


def test_views_of_other_sizes_keep_their_order():
    model = TwoViewModel(_tiny(), image_px=16).eval()
    views = [torch.randn(4, 3, px, px) for px in (16, 16, 24, 16)]
    h, _ = model(views)
    for view, features in zip(views, h, strict=True):
        torch.testing.assert_close(features, model.backbone(view), rtol=1e-4, atol=1e-5)


def test_projector_is_linear_norm_relu_linear_norm():
    model = TwoViewModel(_tiny(projector_hidden=(32, 24), projector_dim=8), image_px=16)
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    bare = TwoViewModel(_tiny(projector_hidden=(), projector_last_norm=False), image_px=16)
    assert [type(layer).__name__ for layer in bare.projector] == ["Linear"]
    assert bare.projector[0].bias is not None


def test_model_stays_channels_last():
    model = TwoViewModel(_tiny(), image_px=16)
    outs = []
    model.backbone.get_submodule("layer2").register_forward_hook(lambda module, args, out: outs.append(out))
    view = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    model([view, view])
    assert outs[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"pool_px": 0}, "pool_px"), ({"projector_hidden": (0,)}, "projector_hidden"), ({"stem": "x"}, "stem")],
)
def test_config_names_the_field(fields, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        ModelConfig(**fields)


def test_average_moves_where_a_bf16_copy_would_stand_still():
    module = nn.Linear(4, 4, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = Ema(module)
    with torch.no_grad():
        module.weight.fill_(1.5)
    bf16_copy = torch.ones(4, 4, dtype=torch.bfloat16)
    for _ in range(100):
        ema.follow(module, torch.tensor(1 - 0.996))
        bf16_copy.lerp_(module.weight, 1 - 0.996)
    assert (bf16_copy == 1).all()
    average = ema.module.weight
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.detach(), torch.full((4, 4), 1.5 - 0.5 * 0.996**100))


def test_average_takes_buffers_along_and_leaves_the_module_alone():
    module = nn.BatchNorm1d(3)
    ema = Ema(module)
    module(torch.randn(8, 3) + 10)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    ema.follow(module, torch.tensor(0.5))
    assert ema.module.num_batches_tracked == 1
    torch.testing.assert_close(ema.module.running_mean, before["running_mean"] / 2)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
