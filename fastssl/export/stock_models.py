"""The model of torchvision or timm that computes what an encoder computes."""

# B images, S side of an image in pixels

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastssl.encoder import Encoder
from fastssl.errors import UserError
from fastssl.models.backbones import TIMM_PREFIX
from fastssl.models.config import ModelConfig
from pipelines.errors import one_line

TOLERANCE = 1e-5  # of the largest feature


@dataclass(frozen=True, kw_only=True)
class StockModel:
    """A model of a library.

    Attributes:
        name: Its name there.
        kwargs: Arguments of its builder, besides num_classes.
        classifier: Path of the module that is an identity; empty: the library leaves it out itself.
    """

    name: str
    kwargs: dict[str, Any]
    classifier: str


def find_stock_model(library: Literal["torchvision", "timm"], model: ModelConfig, encoder: Encoder) -> StockModel:
    """The stock model that takes the encoder's weights with strict=True and computes the same features.

    Args:
        library: Where to look.
        model: The encoder's model section.
        encoder: The encoder.

    Raises:
        UserError: there is none.
    """
    name = model.backbone.removeprefix(TIMM_PREFIX)
    kwargs = {key: value for key, value in model.backbone_kwargs.items() if key not in ("weights", "pretrained")}
    reason = f"{library} has no model named {name}"
    for stock, module in _built(library, name, kwargs):
        try:
            module.load_state_dict(encoder.backbone.state_dict())
        except RuntimeError as error:
            reason = one_line(error)
            continue
        difference = compare_features(encoder, module.eval())
        if difference <= TOLERANCE:
            return stock
        reason = f"its features differ by {difference:.1g} of the largest"
    changed = [
        f"model.{key}"
        for key in ("stem", "stem_channels", "pool_px")
        if getattr(model, key) != getattr(ModelConfig(), key)
    ]
    why = f"{' and '.join(changed)} changed it" if changed else reason[:200]
    raise UserError(f"{model.backbone} is not a stock model of {library} ({why}): export it as onnx or safetensors")


def random_images(encoder: Encoder, num: int = 4) -> torch.Tensor:
    """Images [num, 3, S, S] with the statistics of prepared ones, the same at each call."""
    size_px = encoder.transform.size_px
    return torch.randn(num, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def compare_features(encoder: Encoder, module: nn.Module) -> float:
    """The largest difference between the features of two models, relative to the largest feature."""
    images = random_images(encoder)
    wanted, found = encoder(images), module(images)
    if wanted.shape != found.shape:
        return float("inf")
    return float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-12))


def _built(library: str, name: str, kwargs: dict[str, Any]) -> Iterator[tuple[StockModel, nn.Module]]:
    if library == "timm":
        import timm

        if timm.is_model(name):
            module = timm.create_model(name, num_classes=0, **kwargs)
            yield StockModel(name=name, kwargs=kwargs, classifier=""), module
        return
    from torchvision import models

    if name in models.list_models(module=models):
        try:
            module = models.get_model(name, **kwargs)
        except TypeError:  # arguments of timm's model of the same name
            return
        classifier = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)][-1]
        module.set_submodule(classifier, nn.Identity())
        yield StockModel(name=name, kwargs=kwargs, classifier=classifier), module
