"""Features of images from a frozen encoder."""

# N images, B batch size, F features

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from pipelines.batch import Batch


def encode_batches(encoder: nn.Module, eval_loader: Iterable[Batch]) -> Iterator[np.ndarray]:
    """Encode every image once, in eval mode; each module's own mode is restored afterwards.

    Args:
        encoder: Images [B, 3, H, W] -> features [B, F], on the loader's device.
        eval_loader: Batches of one view each.

    Yields:
        Features float32 [B, F] of each batch, in the loader's order.
    """
    with eval_mode(encoder):
        for batch in eval_loader:
            with torch.inference_mode():
                features = encoder(batch.views[0]).float().cpu().numpy()
            yield features


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Context with the module in eval mode; each submodule's own mode is restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
