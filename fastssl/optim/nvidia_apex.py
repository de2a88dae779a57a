"""NVIDIA apex, if requested and installed: fused optimizers and layer norm. No other module uses apex directly.

apex is built from https://github.com/NVIDIA/apex; the package `apex` on PyPI is another project. Since 2025 apex has no
mixed precision and no data parallelism of its own: torch's autocast and DeepSpeed are used instead.
"""

import importlib
import importlib.metadata
import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fastssl.optim.config import OptimConfig

_HOW = "build it from https://github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
# Classes whose forward is torch's layer norm over the last dimensions. Others permute or cast, and are not replaced.
_PLAIN_LAYER_NORMS = {("torch.nn.modules.normalization", "LayerNorm"), ("timm.layers.norm", "LayerNorm")}


def why_no_apex() -> str | None:
    """Why NVIDIA apex cannot be used in this environment, in one line; None: it can."""
    spec = find_spec("apex")
    if spec is None:
        return f"NVIDIA apex is not installed: {_HOW}"
    folder = Path(next(iter(spec.submodule_search_locations or [spec.origin or "."])))
    if not (folder / "optimizers").is_dir():  # never import it: another project's code may do anything
        return f"{folder} is not NVIDIA apex but another project of that name{_summary()}: uninstall it and {_HOW}"
    if find_spec("amp_C") is None:
        return f"NVIDIA apex at {folder} was built without its CUDA extensions: {_HOW}"
    try:
        importlib.import_module("apex")
    except ImportError as error:
        return f"NVIDIA apex cannot be imported ({error}): {_HOW}, with this torch"
    return None


def build_apex_optimizer(groups: list[dict[str, Any]], cfg: "OptimConfig") -> torch.optim.Optimizer:
    """apex's counterpart of `fastssl.optim.build_optimizer`, for sgd, adamw and lamb.

    Args:
        groups: Parameter groups with "weight_decay"; the parameters must be on the GPU.
        cfg: The optim section.
    """
    optimizers = importlib.import_module("apex.optimizers")
    if cfg.name == "sgd":
        return optimizers.FusedSGD(groups, lr=cfg.base_lr, momentum=cfg.momentum)
    if cfg.name == "adamw":
        return optimizers.FusedAdam(groups, lr=cfg.base_lr, betas=cfg.betas, adam_w_mode=True)
    # Otherwise it would clip to a norm of 1; clipping is train.grad_clip_norm's job.
    return optimizers.FusedLAMB(groups, lr=cfg.base_lr, betas=cfg.betas, max_grad_norm=math.inf)


def apex_layer_norm() -> type[nn.Module]:
    """apex's FusedLayerNorm; under bf16 autocast it returns bf16, while torch's layer norm returns fp32."""
    return importlib.import_module("apex.normalization").FusedLayerNorm


def put_layer_norms(model: nn.Module, layer_norm: type[nn.Module]) -> int:
    """Replace torch's layer norms by another class; parameters and their names are kept.

    Layer norms without a bias, and subclasses that do more (channels-first ones), are not replaced.

    Args:
        model: Changed in place; its weights may be on any device.
        layer_norm: Called with torch's first three arguments: normalized_shape, eps, elementwise_affine.

    Returns:
        Number of modules replaced.
    """
    found = [(name, module) for name, module in model.named_modules() if _is_replaceable(module)]
    for name, old in found:
        new = layer_norm(old.normalized_shape, old.eps, old.elementwise_affine).train(old.training)
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new)
    return len(found)


def _is_replaceable(module: Any) -> bool:
    kind = type(module)
    is_plain = (kind.__module__, kind.__qualname__) in _PLAIN_LAYER_NORMS
    return is_plain and (module.weight is None) == (module.bias is None)


def _summary() -> str:
    try:
        metadata = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f" ({metadata['Summary']})" if "Summary" in metadata else ""
