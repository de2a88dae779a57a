"""Any torchvision or timm classification model as an encoder: classifier removed, parameter names kept."""

# B images, H = W = image_px, F features

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastssl.models.config import ModelConfig
from pipelines.errors import did_you_mean, one_line
from pipelines.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()  # timm imports torchvision too

TIMM_PREFIX = "timm/"
_TRANSFORMS_INPUT = ("googlenet", "inception_v3")  # torchvision sets their transform_input with pre-trained weights


def build_backbone(cfg: ModelConfig, image_px: int) -> tuple[nn.Module, int]:
    """Build the encoder and measure its features on one blank image.

    Modules are replaced in place, never wrapped, so the state dict loads into the plain torchvision or timm model
    with `strict=False`: only the classifier is missing (and the first convolution has another shape with the "cifar"
    stem).

    Args:
        cfg: The model section.
        image_px: Side of the training images in pixels.

    Returns:
        The encoder, images [B, 3, H, W] -> features [B, F], and F.

    Raises:
        ValueError: unknown name (the message suggests the closest known ones), arguments that the model does not
            accept, a stem or pool_px that it does not support, or an output at image_px that is not [B, F].
    """
    is_of_timm = cfg.backbone.startswith(TIMM_PREFIX)
    model, is_resnet = _build_timm(cfg) if is_of_timm else _build_torchvision(cfg)
    for_resnets = (("stem", "imagenet"), ("stem_channels", 0), ("pool_px", 1))
    changed = [f"model.{name}={getattr(cfg, name)}" for name, plain in for_resnets if getattr(cfg, name) != plain]
    if changed and not is_resnet:
        raise ValueError(f"{' and '.join(changed)}: for ResNets only, not for {cfg.backbone}: leave it out")
    if cfg.stem_channels:
        _set_stem_channels(model, cfg)
    if cfg.stem == "cifar":
        _put_cifar_convolution(model)
    if cfg.stem != "imagenet":
        model.maxpool = nn.Identity()
    if cfg.pool_px > 1:
        _put_pool(model, cfg.pool_px)
    return model, count_features(model, cfg.backbone, image_px)


def without_pretraining(cfg: ModelConfig) -> ModelConfig:
    """The same architecture at random weights: for a model whose weights are loaded anyway, without a download."""
    kwargs = {name: value for name, value in cfg.backbone_kwargs.items() if name not in ("pretrained", "weights")}
    if kwargs != cfg.backbone_kwargs and cfg.backbone in _TRANSFORMS_INPUT:
        kwargs.setdefault("transform_input", True)
    return replace(cfg, backbone_kwargs=kwargs)


def _build_torchvision(cfg: ModelConfig) -> tuple[nn.Module, bool]:
    from torchvision import models  # slow to import, and a model of one's own does not need it

    known = models.list_models(module=models)
    if cfg.backbone not in known:
        raise _unknown_backbone(cfg.backbone, known)
    model = _call_builder(models.get_model, cfg.backbone, cfg)
    if getattr(model, "aux_logits", False):  # GoogLeNet and Inception return a tuple in training mode only
        raise ValueError(f"model.backbone: {cfg.backbone} needs model.backbone_kwargs: {{aux_logits: false}}")
    _drop_classifier(model, cfg.backbone)
    return model, isinstance(model, models.ResNet)


def _build_timm(cfg: ModelConfig) -> tuple[nn.Module, bool]:
    import timm  # slow to import, and many runs do not need it
    from timm.models.resnet import ResNet

    name = cfg.backbone.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        raise _unknown_backbone(cfg.backbone, [TIMM_PREFIX + known for known in timm.list_models()])
    with _cache_alone_without_network() if cfg.backbone_kwargs.get("pretrained") else nullcontext():
        model = _call_builder(timm.create_model, name, cfg, num_classes=0)
    return model, isinstance(model, ResNet)


@contextmanager
def _cache_alone_without_network() -> Iterator[None]:
    """Let timm use the cache at once where the Hugging Face Hub does not answer; it would retry for a minute."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not was_offline:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=2).close()
    except urllib.error.HTTPError:  # an answer
        pass
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _call_builder(builder: Any, name: str, cfg: ModelConfig, **fixed: Any) -> nn.Module:
    try:
        return builder(name, **fixed, **cfg.backbone_kwargs)
    except OSError as error:  # pretrained weights that cannot be fetched or read
        message = one_line(error)[:300]
        local = (
            "a local file: model.backbone_kwargs={pretrained: true, pretrained_cfg_overlay: {file: X.safetensors}}"
            if cfg.backbone.startswith(TIMM_PREFIX)
            else f"a local file goes into {torch.hub.get_dir()}/checkpoints"
        )
        raise ValueError(
            f"model.backbone_kwargs: the weights of {cfg.backbone} cannot be loaded ({message}); {local}"
        ) from error
    except Exception as error:  # another package's, on arguments of the user's
        message = one_line(error)
        raise ValueError(f"model.backbone_kwargs {cfg.backbone_kwargs} do not fit {cfg.backbone}: {message}") from error


def _unknown_backbone(name: str, known: list[str]) -> ValueError:
    hint = did_you_mean(name, known) or ": give a torchvision model or timm/<name>"
    return ValueError(f"model.backbone: no model named {name[:100]}{hint}")


def _drop_classifier(model: nn.Module, name: str) -> None:
    # In every torchvision classifier, the last registered linear layer is the one that outputs the class logits.
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"model.backbone: {name} has no linear classifier to remove")
    parent, _, leaf = linears[-1].rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())


def _set_stem_channels(model: Any, cfg: ModelConfig) -> None:
    """Change the width between the first convolution and the first block."""
    block, width = model.layer1[0], cfg.stem_channels
    is_plain = isinstance(model.conv1, nn.Conv2d) and isinstance(model.bn1, nn.BatchNorm2d)
    if not is_plain or block.downsample is None:
        raise ValueError(
            f"model.stem_channels={width}: {cfg.backbone} needs a single first convolution with batch norm, and a "
            "projection in its first block, as in ResNet-50"
        )
    path = next(path for path, module in block.downsample.named_modules() if isinstance(module, nn.Conv2d))
    model.conv1 = _like(model.conv1, out_channels=width)
    model.bn1 = type(model.bn1)(width)
    block.conv1 = _like(block.conv1, in_channels=width)
    block.downsample.set_submodule(path, _like(block.downsample.get_submodule(path), in_channels=width))


def _like(conv: nn.Conv2d, **changes: int) -> nn.Conv2d:
    """A convolution with other channels and new weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
    settings: dict[str, Any] = {name: getattr(conv, name) for name in names} | changes
    made = nn.Conv2d(**settings, bias=conv.bias is not None)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


def _put_cifar_convolution(model: Any) -> None:
    width = len(model.bn1.weight)  # works for any norm, also with timm's deep stem of three convolutions
    model.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")


def _put_pool(model: Any, pool_px: int) -> None:
    if hasattr(model, "global_pool"):  # timm's pooling also flattens
        model.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(pool_px), nn.Flatten(1))
    else:
        model.avgpool = nn.AdaptiveAvgPool2d(pool_px)


@torch.inference_mode()
def count_features(model: nn.Module, name: str, image_px: int) -> int:
    """F, measured on one blank image.

    Args:
        model: The backbone; left in training mode.
        name: Its name, for error messages.
        image_px: Side of the image.

    Raises:
        ValueError: The model does not accept such an image, or does not return features [1, F].
    """
    model.eval()  # one blank image has no batch statistics, and must not move the running ones
    try:
        device = next((parameter.device for parameter in model.parameters()), None)
        h = model(torch.zeros(1, 3, image_px, image_px, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        message = one_line(error)
        raise ValueError(f"model.backbone: {name} does not accept images of {image_px} px: {message}") from error
    model.train()
    if not isinstance(h, torch.Tensor) or h.ndim != 2:
        raise ValueError(f"model.backbone: {name} does not return one feature vector per image")
    return h.shape[1]
