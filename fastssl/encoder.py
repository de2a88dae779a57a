"""Loading the encoder of a run, and computing features of images with it."""

# N images, B of a batch, F features, S side of a view in pixels

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.checkpoint.save_load import load_weights
from fastssl.checkpoint.weights import other_model, put_weights
from fastssl.config import Config, build_config
from fastssl.errors import ConfigError
from fastssl.evaluation.features import eval_mode
from fastssl.models.backbones import build_backbone, count_features, without_pretraining
from fastssl.models.config import ModelConfig
from fastssl.tracking.run_folder import run_above
from pipelines.convert.image_files import ImageFiles, left_out_lines
from pipelines.errors import DataError, one_line
from pipelines.loader import build_eval_loader, cores_per_process
from pipelines.preprocessing import views_from
from pipelines.shards.open_images import names_dataset, open_images
from pipelines.transform import EvalTransform, read_image
from pipelines.views import ViewsConfig


class Encoder(nn.Module):
    """Images to features.

    Attributes:
        backbone: The torchvision or timm model without its classifier, or the module that was trained.
        num_features: F.
        transform: One image to what the encoder takes: a PIL image or uint8 [H, W, 3] to float32 [3, S, S].
        views: A views section with the transform's settings; its augmentations may be others than those of the run.
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

    A weights.pt holds its model section and its pre-processing, so a copy of the file alone is enough. Older files hold
    no pre-processing; they load inside of their run, whose config.yaml has it.

    Args:
        path: A run's folder (its last whole checkpoint), a checkpoint's folder, or a weights.pt anywhere.
        backbone: The module that the weights belong to, for a run of a model of its own; it gets the weights.

    Raises:
        ConfigError: No run, no checkpoint, a file that is damaged or of another program, or weights of another model.
    """
    weights = load_weights(path)
    model, views, backbone_class = described_by(weights, Path(path))
    if backbone is None and backbone_class:
        raise ConfigError(f"{path} was trained with {backbone_class:.200}: pass such a module as backbone=")
    num_features: int | None = None
    try:
        if backbone is None:
            backbone, num_features = build_backbone(without_pretraining(model), weights["image_px"])
        put_weights(weights, path, backbone=backbone)
        if num_features is None:
            num_features = count_features(backbone.cpu(), type(backbone).__name__, weights["image_px"])
    except ConfigError:
        raise
    except ValueError as error:
        raise other_model(weights, path, one_line(error)) from None
    return Encoder(backbone, num_features, views).eval()


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
        images: A .beton file; a data set of many (the folder of a manifest, the manifest, a pattern or a URL, as text);
            a folder, whose image files (those that `fastssl convert` takes) are read once each, in the order of their
            paths; levels uint8 [N, H, W, 3]; a sequence of PIL images or of uint8 [H, W, 3]; or a
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
    place = next(encoder.parameters(), torch.empty(0)).device
    features: list[Tensor] = []
    with eval_mode(encoder):
        for views in _views_of(encoder, images, batch_size, place):
            features.append(encode_views(encoder, views))
    if not sum(map(len, features)):
        raise DataError(f"there is no image in {images if isinstance(images, (str, Path)) else 'what was given'}")
    return torch.cat(features)


@torch.inference_mode()
def encode_views(encoder: Encoder, views: Tensor) -> Tensor:
    """Features float32 [B, F], on the CPU, of views [B, 3, S, S]; the encoder is in eval mode."""
    parameter = next(encoder.parameters(), torch.empty(0))
    on_device = views.to(parameter.device, parameter.dtype, memory_format=torch.channels_last)
    return encoder(on_device).float().cpu()


def list_images(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The image files below a folder, in the order of their paths, and lines about what was left out.

    Raises:
        DataError: It is no folder, or cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder nor a .beton file")
    files = ImageFiles()
    found = files.find([str(folder)])[0]
    kinds = Counter(kind for _, kind in files.left_out)
    return sorted(map(Path, found)), tuple(left_out_lines(str(folder), kinds))


def described_by(weights: Mapping[str, Any], path: Path) -> tuple[ModelConfig, ViewsConfig, str | None]:
    """Model section, views section and class of a user's own backbone: from the file, or from the run around it.

    Args:
        weights: From `load_weights`.
        path: What it read.

    Raises:
        ConfigError: The file is of another version or damaged, or has no run around it that says what it lacks.
    """
    if weights["preprocessing"] is None:
        cfg = _config_above(path)
        own = cfg.custom.get("model")
        if own is None:
            _check_model(weights, cfg.model, path)
        return cfg.model, cfg.views, own
    own = weights["backbone_class"]
    try:
        if not (own is None or isinstance(own, str)):
            raise ValueError(f"its backbone_class is {own!r:.80}")
        return build_config({"model": weights["model"]}).model, views_from(weights["preprocessing"]), own
    except ValueError as error:
        raise ConfigError(f"{path} is of another version of fastssl, or damaged: {error}") from None


def _check_model(weights: Mapping[str, Any], model: ModelConfig, path: Path) -> None:
    """Raise ConfigError where weights are of another backbone than the run's: some differ in no name and no shape."""
    saved = weights["model"]
    for key in ("backbone", "stem", "stem_channels", "backbone_kwargs", "pool_px"):
        values = (saved.get(key), getattr(model, key))
        there, here = (json.dumps(value, sort_keys=True, default=str) for value in values)  # a tuple is a list in YAML
        if key in saved and there != here:
            raise other_model(weights, path, f"model.{key} is {there:.80} there and {here:.80} in the run")


def _views_of(encoder: Encoder, images: Any, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Views [B, 3, S, S]."""
    if isinstance(images, Tensor) and images.is_floating_point():
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"a float tensor must be [images, 3, height, width], got {list(images.shape)}")
        yield from images.split(batch_size)
    elif isinstance(images, (str, Path)) and (Path(images).suffix == ".beton" or names_dataset(images)):
        yield from _views_of_file(encoder, images, batch_size, device)
    elif isinstance(images, (str, Path)):
        yield from _transformed(
            list_images(Path(images))[0], lambda path: encoder.transform(read_image(path)), batch_size
        )
    elif isinstance(images, (np.ndarray, Tensor, Sequence)):
        yield from _transformed(images, encoder.transform, batch_size)
    else:
        raise TypeError(f"images must be a path, an array, a tensor or a sequence, got {type(images).__name__}")


def _views_of_file(encoder: Encoder, path: str | Path, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    loader = build_eval_loader(
        open_images(path), encoder.views, local_batch_size=batch_size, engine="ffcv", device=device
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


def _config_above(path: Path) -> Config:
    """The configuration of the run that contains a path, for weights that do not hold their pre-processing.

    Raises:
        ConfigError: No configuration was found.
    """
    if run := run_above(path):
        return run.load_config()
    raise ConfigError(
        f"there is no config.yaml above {path}, an older file that does not hold its pre-processing: put it back into "
        "its run's folder"
    )
