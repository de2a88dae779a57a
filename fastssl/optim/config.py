"""The `optim:` section of a configuration."""

from dataclasses import dataclass
from typing import Literal

from pipelines.config_field import Section, setting


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimizer and learning-rate schedule.

    Attributes:
        name: "sgd", "adamw", "lars" or "lamb"; all of them work under ZeRO 0 to 2.
        impl: "auto": torch's fused kernels for sgd and adamw; "torch": torch's default, which synchronises with the
            device in each step; "apex": NVIDIA apex's kernels (GPU; no lars, and lamb only without ZeRO). With "auto"
            and "torch", lars and lamb are this package's own implementations.
        base_lr: Peak learning rate for a global batch of 256; scaled by global_batch_size / 256.
        momentum: Momentum of SGD and LARS; 0: none.
        weight_decay: Weight decay of all weights with more than one dimension.
        decay_all: Also apply weight_decay to biases, norm parameters and a loss's learned scalars.
        betas: betas of AdamW and LAMB.
        lars_trust_coefficient: Eta of You et al. 2017, arXiv:1708.03888.
        schedule: When the cosine is updated: at every step, or once per epoch. A warm-up is updated at every step.
        warmup_epochs: Epochs of linear warm-up.
        final_lr_fraction: Final value of the cosine, as a fraction of the peak.
    """

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    impl: Literal["auto", "torch", "apex"] = "auto"
    base_lr: float = setting(0.06, "(0, 1e38]")
    momentum: float = setting(0.9, "[0, 1)")
    weight_decay: float = setting(5e-4, "[0, 100]")
    decay_all: bool = False
    betas: tuple[float, float] = setting((0.9, 0.999), "[0, 1)")
    lars_trust_coefficient: float = setting(0.001, "[1e-9, 1e3]")
    schedule: Literal["step", "epoch"] = "step"
    warmup_epochs: float = setting(10.0, "[0, 1e6]")
    final_lr_fraction: float = setting(0.0, "[0, 1]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.impl == "apex" and self.name == "lars":
            raise ValueError("impl must be auto or torch with optim.name=lars: apex has no LARS")
        if self.impl == "apex" and self.name == "lamb" and self.weight_decay == 0:
            raise ValueError(
                "weight_decay must be > 0 with optim.impl=apex and optim.name=lamb: without it, apex does not scale "
                "the steps of the layers"
            )
