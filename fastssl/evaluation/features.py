"""Features of a whole data set from a frozen encoder."""

# N images, F features

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from pipelines.batch import Batch


@torch.inference_mode()
def extract_features(backbone: nn.Module, eval_loader: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Encode every image once, in eval mode; each module's own mode is restored afterwards.

    Args:
        backbone: Images [B, 3, H, W] -> features [B, F], on the loader's device.
        eval_loader: Batches of one view each.

    Returns:
        Features float32 [N, F] and labels int64 [N], in the loader's order.

    Raises:
        ValueError: the loader gives no batch.
    """
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    with _eval_mode(backbone):
        for batch in eval_loader:
            features.append(backbone(batch.views[0]).float().cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
    if not features:
        raise ValueError("no images to extract features from")
    return np.concatenate(features), np.concatenate(labels)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
