"""The `optim:` section of a configuration and the optimizer built from it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch is imported when an optimizer is built: the command line reads only the section
    from torch import nn
    from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Attributes:
        name: "sgd", "adamw" or "lars".
        base_lr: Peak learning rate for a global batch of 256; scaled by global_batch_size / 256.
        momentum: Of SGD and LARS.
        weight_decay: Not applied to biases and norm parameters.
        betas: Of AdamW.
        lars_trust_coefficient: Eta of You et al. 2017, arXiv:1708.03888.
        warmup_epochs: Epochs of linear warm-up.
        final_lr_fraction: Where the cosine ends, as a fraction of the peak.
    """

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    base_lr: float = 0.06
    momentum: float = 0.9
    weight_decay: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    lars_trust_coefficient: float = 0.001
    warmup_epochs: float = 10.0
    final_lr_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw", "lars"):
            raise ValueError(f"name must be sgd, adamw or lars, not {self.name!r}")
        for name in ("base_lr", "lars_trust_coefficient"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0")
        for name in ("weight_decay", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0")
        if not 0 <= self.momentum < 1:
            raise ValueError("momentum must be in [0, 1)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be in [0, 1)")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ValueError("final_lr_fraction must be in [0, 1]")


def build_optimizer(model: "nn.Module", cfg: OptimConfig) -> "Optimizer":
    """Build the optimizer with two groups: weights, then biases and norm parameters.

    Tensors of at most one dimension have no weight decay and, under LARS, no adaptation. The groups' "lr" is
    base_lr until the schedule sets it.

    Returns:
        torch's SGD or AdamW, or timm's Lars.
    """
    groups = _parameter_groups(model, cfg.weight_decay)
    if cfg.name == "lars":
        return _build_lars(groups, cfg)

    import torch

    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.base_lr, betas=cfg.betas)
    return torch.optim.SGD(groups, lr=cfg.base_lr, momentum=cfg.momentum)


def _parameter_groups(model: "nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _build_lars(groups: list[dict[str, Any]], cfg: OptimConfig) -> "Optimizer":
    from kernels.torchvision_cpu import import_torchvision

    import_torchvision()  # before timm, which imports torchvision itself
    from timm.optim.lars import Lars

    weights, vectors = groups
    # Lars adapts a group that has weight decay or asks for it; the vectors do neither.
    return Lars(
        [weights | {"always_adapt": True}, vectors | {"always_adapt": False}],
        lr=cfg.base_lr,
        momentum=cfg.momentum,  # pyright: ignore[reportArgumentType] timm's default is an int 0
        trust_coeff=cfg.lars_trust_coefficient,
    )
