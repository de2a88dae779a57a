"""Large batches with little memory: gradient caching, Gao et al. 2021 (GradCache), arXiv:2101.06983.

# B local batch, K micro-batches of B/K images, V views, F features, D projection, L the loss of the global batch

The loss compares every image with every other, so it cannot be summed over micro-batches; the encoder can:
(i) encode each micro-batch and keep only its z, (ii) compute dL/dz of the whole batch, (iii) encode each micro-batch
again and backpropagate its rows of dL/dz. Only one micro-batch's activations are held at a time, at the cost of a
second forward pass.

(i) and (iii) are activation checkpointing with the whole encoder as one block, so autograd's backward pass of L does
all three phases: see docs/adr/0011-large-batches-by-cached-gradients.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def encode_in_micro_batches(
    model: nn.Module, views: list[Tensor], num_micro_batches: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Like `model(views)`, but without storing activations: the backward pass encodes each micro-batch again.

    Random numbers (dropout, stochastic depth) are the same in both passes; both passes update the buffers, see
    `unchanged_buffers`. Batch-norm statistics are over all views of one micro-batch.

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
        # Otherwise autocast would cast the weights once for all micro-batches and sum their gradients in 16 bits.
        torch.clear_autocast_cache()
    h, z = ([torch.cat(view_parts) for view_parts in zip(*both, strict=True)] for both in zip(*parts, strict=True))
    return h, z


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers at the end: a backward pass that encodes again must not count the batch twice.

    The buffers are batch norm's running statistics; no computation in training mode reads them.
    """
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
