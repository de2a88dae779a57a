"""Activation checkpointing: the backbone stores only the inputs of its blocks; the backward pass recomputes the rest.

Chen et al. 2016, arXiv:1604.06174. Each block runs twice; its activations exist only while it is differentiated.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Attributes of torchvision's models that hold their blocks in order; timm's models implement this themselves.
_BLOCKS = {
    "ResNet": ("layer1", "layer2", "layer3", "layer4"),
    "VisionTransformer": ("encoder.layers",),
    "SwinTransformer": ("features",),
    "ConvNeXt": ("features",),
    "EfficientNet": ("features",),
}


class CheckpointedBlocks(nn.Sequential):
    """A sequence of blocks that stores only their inputs; without gradients it is a plain sequence."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x) if isinstance(block, CheckpointedBlocks) else checkpoint(block, x, use_reentrant=False)
        return x


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """Make a torchvision or timm model recompute its activations, in place; parameter names do not change.

    The recomputing forward passes update batch norm's running statistics a second time: see
    `fastssl.models.grad_cache.unchanged_buffers`.

    Args:
        backbone: The model.
        name: Its name in model.backbone, for the error message.

    Raises:
        ValueError: it is neither a timm model that supports this nor one of the torchvision models known here.
    """
    if hasattr(backbone, "set_grad_checkpointing"):
        try:
            backbone.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except AssertionError:  # timm raises this for unsupported models
            raise ValueError(
                f"model.activation_checkpointing: timm does not support it for {name}: set it to false"
            ) from None
        return
    paths = _BLOCKS.get(type(backbone).__name__)
    if paths is None:
        raise ValueError(
            f"model.activation_checkpointing: {name} does not support it; torchvision's {', '.join(_BLOCKS)} and timm/ "
            "models do"
        )
    for path in paths:
        _checkpoint_blocks(backbone.get_submodule(path))


def _checkpoint_blocks(blocks: nn.Module) -> None:
    if type(blocks) is not nn.Sequential:  # a block itself, such as torchvision's convolution with norm
        return
    blocks.__class__ = CheckpointedBlocks
    for block in blocks.children():
        _checkpoint_blocks(block)
