"""Initial weights for `--init`: of torchvision, of timm, or from a file, as a file that `run.init_from` takes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.checkpoint.checksums import save_file
from fastssl.checkpoint.save_load import load_weights
from fastssl.checkpoint.tensor_file import is_state
from fastssl.errors import ConfigError, UserError
from fastssl.models.backbones import TIMM_PREFIX, build_backbone
from fastssl.models.config import ModelConfig
from pipelines.downloads import limited_silence
from pipelines.errors import one_line
from pipelines.preprocessing import views_from

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SOURCES = "torchvision, torchvision:NAME, timm:NAME, a run's folder or a file of weights"
_IMAGE_PX = 224  # of ImageNet's weights
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights to start from.

    Attributes:
        path: What `run.init_from` is set to.
        model: The model section that the weights belong to, as far as it differs from the default.
        size_px: Side of the images that the model needs; None: any.
        mean: Per channel, of the normalisation that the weights were trained with.
        std: Likewise.
    """

    path: str
    model: dict[str, Any]
    size_px: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def prepare_initial_weights(init: str, out: Path, *, backbone: str) -> InitialWeights:
    """Fetch or read initial weights, and write those of other libraries to a file of our own.

    Args:
        init: "torchvision" (the default backbone), "torchvision:NAME", "timm:NAME", a run's folder, a weights.pt, or a
            state dict of a torchvision or timm model.
        out: The file to write.
        backbone: For "torchvision" and for a state dict, which does not name its model.

    Raises:
        UserError: no such weights, weights that cannot be fetched, or of another model.
    """
    library, _, name = init.partition(":")
    if library in ("torchvision", "timm") and not Path(init).exists():
        if library == "timm" and not name:
            raise UserError("--init timm:NAME needs the name of a model, such as timm:vit_small_patch16_224")
        return _of_library(TIMM_PREFIX + name if library == "timm" else name or backbone, library, out)
    path = Path(init)
    if path.is_dir():
        return _own(path)
    if not path.is_file():
        raise UserError(f"--init {init[:300]}: give {_SOURCES}")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--init {path}: a file of weights ends in {', '.join(_SUFFIXES)}")
    try:
        return _own(path)
    except ConfigError as error:
        state = _read_state(path)
        if {"backbone", "projector"} <= state.keys():  # a file of ours, and damaged
            raise UserError(f"--init: {error}") from None
    return _of_state(path, _tensors(path, state), backbone, out)


def _own(path: Path) -> InitialWeights:
    weights = load_weights(path)
    plain = asdict(ModelConfig())
    model = {key: value for key, value in weights["model"].items() if key in plain and value != plain[key]}
    if not weights["preprocessing"]:
        return InitialWeights(path=str(path), model=model)
    try:
        views = views_from(weights["preprocessing"])
    except ValueError as error:
        raise UserError(f"--init {path}: {error}") from None
    return InitialWeights(path=str(path), model=model, mean=views.mean, std=views.std)


def _of_library(name: str, library: str, out: Path) -> InitialWeights:
    cfg = ModelConfig(
        backbone=name, backbone_kwargs={"pretrained": True} if library == "timm" else {"weights": "DEFAULT"}
    )
    with limited_silence():
        module = _built(cfg)
    about = getattr(module, "pretrained_cfg", None) or {}  # of timm
    plain = ModelConfig(backbone=name)
    _save(module.state_dict(), plain, out)
    size_px = about["input_size"][-1] if about.get("fixed_input_size") else None
    if library == "torchvision":
        size_px = getattr(module, "image_size", None)  # of its ViTs, which take no other
    mean, std = (tuple(about.get(key, default)) for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    return InitialWeights(path=str(out), model={"backbone": name}, size_px=size_px, mean=mean, std=std)


def _of_state(path: Path, state: dict[str, torch.Tensor], backbone: str, out: Path) -> InitialWeights:
    """Weights of a torchvision or timm model, whose classifier is left out."""
    cfg = ModelConfig(backbone=backbone)
    module = _built(cfg)
    _load(module, state, path, backbone)
    _save(module.state_dict(), cfg, out)
    return InitialWeights(path=str(out), model={"backbone": backbone})


def _built(cfg: ModelConfig) -> nn.Module:
    try:
        return build_backbone(cfg, _IMAGE_PX)[0]
    except ValueError as error:
        raise UserError(f"--init: {error}") from None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers' own, of many types
        raise UserError(f"--init {path} cannot be read as weights ({one_line(error)[:200]})") from None
    return state if isinstance(state, dict) else {}


def _tensors(path: Path, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    for key in ("state_dict", "model"):  # common wrappings of a state dict
        if isinstance(state.get(key), dict):
            state = state[key]
    if not state or not is_state(state):
        raise UserError(f"--init {path} holds no state dict: names and tensors")
    return state


def _load(module: nn.Module, state: dict[str, torch.Tensor], path: Path, backbone: str) -> None:
    wanted = module.state_dict()
    state = {name.removeprefix("module."): value for name, value in state.items()}
    fitting = {name: value for name, value in state.items() if name in wanted and value.shape == wanted[name].shape}
    if missing := [name for name in wanted if name not in fitting]:
        raise UserError(
            f"--init {path} does not fit {backbone}: {len(missing)} of {len(wanted)} tensors are missing or have "
            f"another shape, such as {missing[0]}; name the model that they are of with --set model.backbone=NAME"
        )
    module.load_state_dict(fitting)


def _save(state: dict[str, torch.Tensor], cfg: ModelConfig, out: Path) -> None:
    weights = {"backbone": state, "projector": {}, "model": asdict(cfg), "image_px": _IMAGE_PX}
    temporary = out.with_name(f".{out.name}.tmp")
    save_file(weights, temporary)
    temporary.replace(out)
