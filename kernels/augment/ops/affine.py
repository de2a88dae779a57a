"""Affine: torchvision's RandomAffine, bilinear, with zeros (black) outside the image."""

# B samples; u are uniform numbers in [0, 1)

from typing import Any

import numpy as np

from kernels.augment.ops.base import Field, Op, between, positive_range, probability


def draw(spec: Any, u: np.ndarray) -> dict[str, Any]:
    """torchvision's inverse affine matrix (v2 `_get_inverse_affine_matrix`) in pixel indices; u [B, 6] -> [B, 6]."""
    angle = np.radians(between(u[:, 0], (-spec.affine_degrees, spec.affine_degrees)))
    shift_px = spec.affine_translate_fraction * spec.size_px
    shift_x, shift_y = np.rint(between(u[:, 1:3], (-shift_px, shift_px))).T
    scale = between(u[:, 3], spec.affine_scale)
    shear_x, shear_y = np.radians(between(u[:, 4:6], (-spec.affine_shear_degrees, spec.affine_shear_degrees))).T
    # rotation * shear_y * shear_x = [[a, b], [c, d]] with determinant 1
    a, c = np.cos(angle - shear_y) / np.cos(shear_y), np.sin(angle - shear_y) / np.cos(shear_y)
    b, d = -(a * np.tan(shear_x) + np.sin(angle)), np.cos(angle) - c * np.tan(shear_x)
    m0, m1, m3, m4 = d / scale, -b / scale, -c / scale, a / scale
    centre = (spec.size_px - 1) / 2
    m2 = centre - m0 * (centre + shift_x) - m1 * (centre + shift_y)
    m5 = centre - m3 * (centre + shift_x) - m4 * (centre + shift_y)
    return {"affine_matrix": np.stack([m0, m1, m2, m3, m4, m5], 1)}


def reference(image: Any, record: Any, _v2: Any) -> Any:
    """v2.affine(..., BILINEAR) with the matrix already drawn."""
    import torch

    height, width = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32), indexing="ij"
    )
    m0, m1, m2, m3, m4, m5 = record["affine_matrix"].tolist()
    # grid_sample expects [-1, 1] from edge to edge (align_corners=False)
    grid_x = (2 * (m0 * x + m1 * y + m2) + 1) / width - 1
    grid_y = (2 * (m3 * x + m4 * y + m5) + 1) / height - 1
    grid = torch.stack((grid_x, grid_y), dim=-1)
    return torch.nn.functional.grid_sample(image[None], grid[None], padding_mode="zeros", align_corners=False)[0]


AFFINE = Op(
    name="affine",
    number=1,
    fields={
        "affine_p": probability(0.0),
        "affine_degrees": Field(0.0, "[0, 360]"),  # rotation in [-degrees, degrees]
        # of the side, rounded to whole pixels
        "affine_translate_fraction": Field(0.0, "[0, 1]"),
        "affine_scale": positive_range(1.0, 1.0),
        # in x and in y, each in [-degrees, degrees]
        "affine_shear_degrees": Field(0.0, "[0, 90)"),
    },
    params=(
        ("affine", np.bool_),
        # Output pixel (X, Y) samples input point (x, y): x = m0 X + m1 Y + m2, y = m3 X + m4 Y + m5, in pixel indices
        # of the resized view: (0, 0) is the centre of the top left pixel.
        ("affine_matrix", np.float32, (6,)),
    ),
    num_draws=6,  # angle, shift x, shift y, scale, shear x, shear y
    draw=draw,
    reference=reference,
)
