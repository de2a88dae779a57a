"""Large batches in little memory: gradient caching, Gao et al. 2021 (GradCache), arXiv:2101.06983.

# B local batch, K micro-batches of B/K images, V views, F features, D projection, L the loss of the global batch

The loss compares every image with every other, so it cannot be summed over micro-batches; the encoder can:
(i) encode each micro-batch and keep its z alone, (ii) dL/dz of the whole batch, (iii) encode each micro-batch again and
go back through it from its rows of dL/dz. One micro-batch's activations are held at a time, for a second forward.

(i) and (iii) are what activation checkpointing does with the whole encoder as its block, so autograd's own backward
pass of L is all three phases: see docs/adr/0011-large-batches-by-cached-gradients.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def encode_in_micro_batches(
    model: nn.Module, views: list[Tensor], num_micro_batches: int
) -> tuple[list[Tensor], list[Tensor]]:
    """What `model(views)` returns, without the activations: the backward pass encodes each micro-batch once more.

    Random numbers (dropout, stochastic depth) are the same in both; the buffers move in both, see `unchanged_buffers`.
    Batch norm takes its statistics from a micro-batch, all views of it.

    Args:
        model: V views [b, 3, H, W] -> V features [b, F] and V projections [b, D].
        views: V tensors [B, 3, H, W].
        num_micro_batches: K, divides B.

    Returns:
        h, V tensors [B, F], and z, V tensors [B, D].
    """
    parts = []
    for micro_views in zip(*(view.chunk(num_micro_batches) for view in views), strict=True):
        parts.append(checkpoint(model, list(micro_views), use_reentrant=False))
        # Else autocast would cast the weights for all micro-batches together, and sum their gradients in 16 bits.
        torch.clear_autocast_cache()
    h, z = ([torch.cat(view_parts) for view_parts in zip(*both, strict=True)] for both in zip(*parts, strict=True))
    return h, z


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Put the module's buffers back at the end: a backward pass that encodes again must not count the batch twice.

    They are batch norm's running statistics; nothing that is computed in training mode reads them.
    """
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
