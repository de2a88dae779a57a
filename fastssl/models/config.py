"""The `model:` section of a configuration; imports no torch, so that the command line starts fast."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.config_field import Section, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The encoder and its projector.

    Attributes:
        backbone: Name of a torchvision classification model, or `timm/<name>`; random initial weights.
        stem: "cifar": a 3x3 stride-1 first convolution and no max-pooling, for images of about 32 px and less
            (SimCLR, arXiv:2002.05709, appendix B.9). "no_pool": the model's own first convolution without max-pooling,
            which halves the resolution once instead of twice. Both for ResNets only. "imagenet": the unchanged model.
        backbone_kwargs: Passed to the model's builder, such as timm's `layers` and `channels`.
        stem_channels: Output channels of the first convolution; 0: the model's own, 64 in a ResNet. For ResNets with a
            single first convolution and a projection in the first block, such as ResNet-50. 128, with timm's
            `channels: [128, 256, 512, 1024]`, is the ResNet-50 of twice the width.
        pool_px: Features are average-pooled to pool_px x pool_px and flattened; more than 1 with ResNets only.
            1: the backbone's own pooling.
        projector_hidden: Widths of the projector's hidden layers, each followed by batch norm and ReLU.
        projector_dim: Width D of the projections.
        projector_last_norm: Whether the last layer is also followed by batch norm.
        batch_norm: Batch-norm statistics during pre-training, also in the projector and predictor: "per_rank", over the
            images of one process; "sync", over those of all processes.
        activation_checkpointing: Pre-training stores only the inputs of the backbone's blocks and recomputes the rest
            in the backward pass: saves memory at the cost of a second forward pass. Supported by torchvision's ResNets,
            ViTs, Swin, ConvNeXt and EfficientNet, and by the timm models that implement it.
        layer_norm: "apex": use NVIDIA apex's kernel for the layer norms while training (GPU); names and values of the
            weights do not change.
    """

    backbone: str = "resnet18"
    stem: Literal["imagenet", "no_pool", "cifar"] = "imagenet"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    stem_channels: int = setting(0, "[0, 65536]")
    pool_px: int = setting(1, "[1, 64]")
    projector_hidden: tuple[int, ...] = setting((512,), "[1, 65536]")
    projector_dim: int = setting(128, "[1, 131072]")
    projector_last_norm: bool = True
    batch_norm: Literal["per_rank", "sync"] = "per_rank"
    activation_checkpointing: bool = setting(False, free=True)
    layer_norm: Literal["torch", "apex"] = "torch"
