"""Loading the encoder of a run, and computing features of images with it."""

# N images, B of a batch, F features, S side of a view in pixels

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.checkpoint.save_load import load_weights
from fastssl.config import Config, load_config
from fastssl.errors import ConfigError
from fastssl.evaluation.features import eval_mode
from fastssl.models.backbones import build_backbone, count_features
from fastssl.models.config import ModelConfig
from pipelines.beton import BetonReader
from pipelines.convert.image_files import ImageFiles
from pipelines.errors import DataError
from pipelines.loader import build_eval_loader, cores_per_process
from pipelines.transform import EvalTransform, read_image
from pipelines.views import ViewsConfig

_ABOVE_WEIGHTS = 4  # weights.pt lies in RUN/checkpoints/step_X/


class Encoder(nn.Module):
    """Images to features.

    Attributes:
        backbone: The torchvision or timm model without its classifier, or the module that was trained.
        num_features: F.
        transform: One image to what the encoder takes: a PIL image or uint8 [H, W, 3] to float32 [3, S, S].
        views: The views section that the transform is made of.
    """

    def __init__(self, backbone: nn.Module, num_features: int, views: ViewsConfig) -> None:
        super().__init__()
        self.backbone, self.num_features, self.views = backbone, num_features, views
        self.transform = EvalTransform(views)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F] of images [B, 3, S, S], normalised as `transform` does."""
        return self.backbone(images)


def load_encoder(path: str | Path, *, backbone: nn.Module | None = None) -> Encoder:
    """The encoder of a run, on the CPU and in eval mode.

        encoder = fastssl.load_encoder("runs/a")
        features = encoder(encoder.transform(image)[None])

    Args:
        path: A run's folder (its last whole checkpoint), a checkpoint's folder in it, or the weights.pt there.
        backbone: The module that the weights belong to, for a run of a model of its own; it gets the weights.

    Raises:
        ConfigError: No run, no checkpoint, or weights of another model.
    """
    weights = load_weights(path)
    cfg = _config_above(Path(path))
    if backbone is None and "model" in cfg.custom:
        raise ConfigError(f"{path} was trained with {cfg.custom['model']}: pass such a module as backbone=")
    num_features: int | None = None
    try:
        if backbone is None:
            _check_model(weights["model"], cfg.model)
            backbone, num_features = build_backbone(cfg.model, weights["image_px"])
        backbone.load_state_dict(weights["backbone"])
        if num_features is None:
            num_features = count_features(backbone.cpu(), type(backbone).__name__, weights["image_px"])
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} holds weights of another model: {' '.join(str(error).split())[:200]}") from None
    return Encoder(backbone, num_features, cfg.views).eval()


def embed(
    encoder: Encoder,
    images: str | Path | np.ndarray | Tensor | Sequence[Any],
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
) -> Tensor:
    """Features of images, in their order.

        features = fastssl.embed(encoder, "photographs/")

    Args:
        encoder: From `load_encoder`; it is in eval mode during the call.
        images: A .beton file; a folder, whose image files (those that `fastssl convert` takes) are read once each, in
            the order of their paths; levels uint8 [N, H, W, 3]; a sequence of PIL images or of uint8 [H, W, 3]; or a
            float tensor [N, 3, S, S] that is normalised already, as `encoder.transform` gives it.
        batch_size: Number of images per forward pass.
        device: Device to move the encoder to; None: the encoder is not moved.

    Returns:
        float32 [N, F], on the CPU.

    Raises:
        DataError: A file cannot be read, or there is no image.
        TypeError, ValueError: `images` is something else.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if device is not None:
        encoder.to(device)
    parameter = next(encoder.parameters(), torch.empty(0))
    place, dtype = parameter.device, parameter.dtype
    features: list[Tensor] = []
    with eval_mode(encoder), torch.inference_mode():
        for views in _views_of(encoder, images, batch_size, place):
            features.append(encoder(views.to(place, dtype, memory_format=torch.channels_last)).float().cpu())
    if not sum(map(len, features)):
        raise DataError(f"there is no image in {images if isinstance(images, (str, Path)) else 'what was given'}")
    return torch.cat(features)


def _check_model(saved: dict[str, Any], model: ModelConfig) -> None:
    """Raise ValueError where weights are of another backbone than the run's: some differ in no name and no shape."""
    for key in ("backbone", "stem", "stem_channels", "backbone_kwargs", "pool_px"):
        values = (saved.get(key), getattr(model, key))
        there, here = (json.dumps(value, sort_keys=True, default=str) for value in values)  # a tuple is a list in YAML
        if key in saved and there != here:
            raise ValueError(f"model.{key} is {there:.80} there and {here:.80} in the run")


def _views_of(encoder: Encoder, images: Any, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Views [B, 3, S, S]."""
    if isinstance(images, Tensor) and images.is_floating_point():
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"a float tensor must be [images, 3, height, width], got {list(images.shape)}")
        yield from images.split(batch_size)
    elif isinstance(images, (str, Path)) and Path(images).suffix == ".beton":
        yield from _views_of_file(encoder, Path(images), batch_size, device)
    elif isinstance(images, (str, Path)):
        yield from _transformed(
            _image_files(Path(images)), lambda path: encoder.transform(read_image(path)), batch_size
        )
    elif isinstance(images, (np.ndarray, Tensor, Sequence)):
        yield from _transformed(images, encoder.transform, batch_size)
    else:
        raise TypeError(f"images must be a path, an array, a tensor or a sequence, got {type(images).__name__}")


def _views_of_file(encoder: Encoder, path: Path, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    loader = build_eval_loader(
        BetonReader(path), encoder.views, local_batch_size=batch_size, engine="ffcv", device=device
    )
    try:
        for batch in loader:
            yield batch.views[0]
    finally:
        loader.close()


def _transformed(images: Any, transform: Callable[[Any], Tensor], batch_size: int) -> Iterator[Tensor]:
    with ThreadPoolExecutor(cores_per_process()) as pool:
        remaining = iter(images)
        while some := list(islice(remaining, batch_size)):
            yield torch.stack(list(pool.map(transform, some)))


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder nor a .beton file")
    return sorted(map(Path, ImageFiles().find([str(folder)])[0]))


def _config_above(path: Path) -> Config:
    """The configuration of the run that contains a path.

    Raises:
        ConfigError: No configuration was found.
    """
    for folder in [path, *path.absolute().parents][:_ABOVE_WEIGHTS]:
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml")
    raise ConfigError(f"there is no config.yaml above {path}: give a run's folder, or a path in it")
