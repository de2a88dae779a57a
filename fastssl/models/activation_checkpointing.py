"""Activation checkpointing: the backbone keeps the inputs of its blocks; the backward pass computes the rest again.

Chen et al. 2016, arXiv:1604.06174. Each block is run twice; its activations live while it is differentiated.
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Where torchvision's models hold their blocks, one after the other; timm's models know it themselves.
_BLOCKS = {
    "ResNet": ("layer1", "layer2", "layer3", "layer4"),
    "VisionTransformer": ("encoder.layers",),
    "SwinTransformer": ("features",),
    "ConvNeXt": ("features",),
    "EfficientNet": ("features",),
}


class CheckpointedBlocks(nn.Sequential):
    """A sequence of blocks that keeps their inputs only; without gradients it is a plain sequence."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x) if isinstance(block, CheckpointedBlocks) else checkpoint(block, x, use_reentrant=False)
        return x


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """Let a torchvision or timm model recompute its activations, in place; its parameters and their names stay.

    The forward passes of the recomputation move batch norm's running statistics again, as the first ones did:
    see `fastssl.models.grad_cache.unchanged_buffers`.

    Args:
        backbone: The model.
        name: As in model.backbone, for the message.

    Raises:
        ValueError: it is neither a timm model that can, nor one of torchvision's that are known here.
    """
    if hasattr(backbone, "set_grad_checkpointing"):
        try:
            backbone.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except AssertionError:  # timm's word for a model that cannot
            raise ValueError(f"model.activation_checkpointing: timm has none for {name}") from None
        return
    paths = _BLOCKS.get(type(backbone).__name__)
    if paths is None:
        raise ValueError(
            f"model.activation_checkpointing: not for {name}, only for torchvision's {', '.join(_BLOCKS)} and for timm/"
        )
    for path in paths:
        _checkpoint_blocks(backbone.get_submodule(path))


def _checkpoint_blocks(blocks: nn.Module) -> None:
    if type(blocks) is not nn.Sequential:  # a block itself, such as torchvision's convolution with norm
        return
    blocks.__class__ = CheckpointedBlocks
    for block in blocks.children():
        _checkpoint_blocks(block)
