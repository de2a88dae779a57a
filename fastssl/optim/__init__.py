"""Optimizers, learning-rate schedules, and skipping a step on the device."""

from typing import TYPE_CHECKING, Any

from fastssl.optim.config import OptimConfig

if TYPE_CHECKING:  # torch is imported only when an optimizer is built, not to read a configuration
    from torch import nn
    from torch.optim import Optimizer


def build_optimizer(model: "nn.Module", cfg: OptimConfig) -> "Optimizer":
    """Build the optimizer with two groups: weights, then biases and norm parameters.

    Tensors with at most one dimension have no weight decay unless `decay_all` is set, and no layer-wise adaptation in
    LARS and LAMB. The groups' "lr" is base_lr until the schedule sets it. Under ZeRO, LARS and LAMB need a call of
    `fastssl.optim.layerwise.bind_partitions` after DeepSpeed has wrapped them.

    Args:
        model: On the device that it will be trained on.
        cfg: The optim section; for "apex", call `fastssl.build_run.check_apex` before.
    """
    import torch

    from fastssl.optim.lamb import Lamb
    from fastssl.optim.lars import Lars

    weights, vectors = _parameter_groups(model, cfg)
    if cfg.impl == "apex":
        from fastssl.optim.nvidia_apex import build_apex_optimizer

        return build_apex_optimizer([weights, vectors], cfg)
    layerwise = [weights | {"adapt": True}, vectors | {"adapt": False}]
    if cfg.name == "lars":
        eta = cfg.lars_trust_coefficient
        return Lars(layerwise, lr=cfg.base_lr, momentum=cfg.momentum, trust_coefficient=eta)
    if cfg.name == "lamb":
        return Lamb(layerwise, lr=cfg.base_lr, betas=cfg.betas)
    fused = True if cfg.impl == "auto" else None  # None: torch's default
    if cfg.name == "adamw":
        return torch.optim.AdamW([weights, vectors], lr=cfg.base_lr, betas=cfg.betas, fused=fused)
    return torch.optim.SGD([weights, vectors], lr=cfg.base_lr, momentum=cfg.momentum, fused=fused)


def _parameter_groups(model: "nn.Module", cfg: OptimConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": cfg.weight_decay if cfg.decay_all else 0.0},
    )
