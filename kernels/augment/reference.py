"""The pixel op with torchvision v2's functional ops on float32 in [0, 1], view by view."""

# B samples, Vg views of one size, H and W height and width in pixels

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.augment.params import BRIGHTNESS, CONTRAST, HUE, SATURATION
from kernels.torchvision_cpu import import_torchvision


def augment_reference(views: np.ndarray, params: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Apply all ops to all views with torchvision; arguments as in `augment`.

    Returns:
        float32 [Vg, B, H, W, 3].
    """
    import_torchvision()
    from torchvision.transforms.v2 import functional as v2

    num_samples, num_views = params.shape
    out = torch.empty((num_views, num_samples, *views.shape[2:]))
    for sample, view in np.ndindex(num_samples, num_views):
        image = torch.from_numpy(views[sample, view]).permute(2, 0, 1)
        image = v2.to_dtype(image, torch.float32, scale=True)
        image = _apply(v2, image, params[sample, view])
        out[view, sample] = v2.normalize(image, list(mean), list(std)).permute(1, 2, 0)
    return out


def _apply(v2: Any, image: Tensor, record: Any) -> Tensor:
    """Apply the ops to one view, [3, H, W] in [0, 1], in order, without normalisation."""
    if record["affine"]:
        image = _affine(image, record["affine_matrix"])
    if record["flip"]:
        image = v2.horizontal_flip(image)
    if record["jitter"]:
        image = _jitter(v2, image, record)
    if record["grayscale"]:
        image = v2.rgb_to_grayscale(image, num_output_channels=3)
    if record["blur_sigma"] > 0:
        kernel_px = min(int(record["blur_kernel_px"]), 2 * min(image.shape[-2:]) - 1)
        image = v2.gaussian_blur(image, [kernel_px] * 2, [float(record["blur_sigma"])] * 2)
    if record["solarize"]:
        image = v2.solarize(image, float(record["solarize_threshold"]))
    return image


def _affine(image: Tensor, matrix: np.ndarray) -> Tensor:
    """Bilinear, zeros outside: v2.affine(..., BILINEAR) with the matrix already drawn."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32), indexing="ij"
    )
    m0, m1, m2, m3, m4, m5 = matrix.tolist()
    # grid_sample expects [-1, 1] from edge to edge (align_corners=False)
    grid_x = (2 * (m0 * x + m1 * y + m2) + 1) / width - 1
    grid_y = (2 * (m3 * x + m4 * y + m5) + 1) / height - 1
    grid = torch.stack((grid_x, grid_y), dim=-1)
    return torch.nn.functional.grid_sample(image[None], grid[None], padding_mode="zeros", align_corners=False)[0]


def _jitter(v2: Any, image: Tensor, record: Any) -> Tensor:
    adjust = {
        BRIGHTNESS: v2.adjust_brightness,
        CONTRAST: v2.adjust_contrast,
        SATURATION: v2.adjust_saturation,
        HUE: v2.adjust_hue,
    }
    for op in record["jitter_order"].tolist():
        factor = float(record["jitter_factor"][op])
        if factor != (0.0 if op == HUE else 1.0):
            image = adjust[op](image, factor)
    return image
