"""The `model:` section of a configuration; imports no torch, so that the command line starts fast."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config_field import free


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder and its projector.

    Attributes:
        backbone: A torchvision classification model by name, or `timm/<name>`; random initial weights.
        stem: "cifar": a 3x3 stride-1 first convolution and no max-pooling, for images of about 32 px and less
            (SimCLR, arXiv:2002.05709, appendix B.9). "no_pool": the model's own first convolution, no max-pooling,
            which halves the resolution once and not twice. Both for ResNets only. "imagenet": as the model comes.
        backbone_kwargs: Passed on to the model's builder, such as timm's `layers` and `channels`. A timm ResNet's
            first width is 64, or twice its `stem_width` with `stem_type: deep`; the "cifar" stem keeps it.
        pool_px: Features are average-pooled to pool_px x pool_px and flattened; more than 1 with ResNets only.
            1: the backbone's own pooling.
        projector_hidden: Widths of the projector's hidden layers, each followed by batch norm and ReLU.
        projector_dim: Width D of the projections.
        projector_last_norm: Batch norm after the last layer too.
        batch_norm: Where every batch norm, the projector's and a predictor's too, takes its statistics from while
            pre-training: "per_rank", the images of one process; "sync", those of all processes.
        activation_checkpointing: Pre-training keeps only the inputs of the backbone's blocks and computes the rest
            again in the backward pass: less memory for a second forward pass. Torchvision's ResNets, ViTs, Swin,
            ConvNeXt and EfficientNet, and the timm models that can.
        layer_norm: "apex": NVIDIA apex's kernel in the place of the layer norms while training (GPU); the names and the
            content of the weights do not change.
    """

    backbone: str = "resnet18"
    stem: Literal["imagenet", "no_pool", "cifar"] = "imagenet"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    pool_px: int = 1
    projector_hidden: tuple[int, ...] = (512,)
    projector_dim: int = 128
    projector_last_norm: bool = True
    batch_norm: Literal["per_rank", "sync"] = "per_rank"
    activation_checkpointing: bool = free(False)
    layer_norm: Literal["torch", "apex"] = "torch"

    def __post_init__(self) -> None:
        if self.stem not in ("imagenet", "no_pool", "cifar"):
            raise ValueError(f"stem must be imagenet, no_pool or cifar, not {self.stem!r}")
        if self.layer_norm not in ("torch", "apex"):
            raise ValueError(f"layer_norm must be torch or apex, not {self.layer_norm!r}")
        for name in ("pool_px", "projector_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1")
        if any(width < 1 for width in self.projector_hidden):
            raise ValueError("projector_hidden must hold widths >= 1")
