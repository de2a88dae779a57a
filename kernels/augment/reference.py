"""The pixel op with torchvision v2's functional ops on float32 in [0, 1], view by view."""

# B samples, Vg views of one size, H and W height and width in pixels

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.augment.ops import OPS


def augment_reference(views: np.ndarray, params: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Apply all ops to all views with torchvision; arguments as in `augment`.

    Returns:
        float32 [Vg, B, H, W, 3].
    """
    from torchvision.transforms.v2 import functional as v2

    num_samples, num_views = params.shape
    out = torch.empty((num_views, num_samples, *views.shape[2:]))
    for sample, view in np.ndindex(num_samples, num_views):
        image = torch.from_numpy(views[sample, view]).permute(2, 0, 1)
        image = v2.to_dtype(image, torch.float32, scale=True)
        for op in OPS:
            if np.any(params[sample, view][op.gate]):
                image = op.reference(image, params[sample, view], v2)
        out[view, sample] = v2.normalize(image, list(mean), list(std)).permute(1, 2, 0)
    return out
