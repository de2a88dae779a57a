"""Inputs of the pixel op: the drawn parameters of each view, and stored images from which it crops views itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Op codes of `jitter_order`, the order in which colour jitter's four parts are applied.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3

# One record per view, as written by `pipelines.views.draw`. An op that is off is marked as off and its fields are zero,
# so that an implementation can skip it and still equal the reference. If jitter is on, a part of strength zero has
# exactly the neutral factor (1, hue 0) and is skipped too, as in torchvision.
VIEW_PARAMS = np.dtype(
    [
        ("crop_box", np.int32, (4,)),  # top, left, height, width in pixels of the source image
        ("affine", np.bool_),
        # Output pixel (X, Y) samples input point (x, y): x = m0 X + m1 Y + m2, y = m3 X + m4 Y + m5, in pixel indices
        # of the resized view: (0, 0) is the centre of the top left pixel. Outside the image, values are 0 (black).
        ("affine_matrix", np.float32, (6,)),
        ("flip", np.bool_),  # horizontal
        ("jitter", np.bool_),
        ("jitter_order", np.uint8, (4,)),  # a permutation of the op codes above
        (
            "jitter_factor",
            np.float32,
            (4,),
        ),  # by op code: brightness, contrast, saturation (1 = unchanged), hue shift in turns [-.5, .5]
        ("grayscale", np.bool_),
        ("blur_sigma", np.float32),  # in output pixels; 0 = no blur
        ("blur_kernel_px", np.int32),  # odd kernel side in output pixels
        ("solarize", np.bool_),
        ("solarize_threshold", np.float32),  # in [0, 1]; pixels >= threshold are inverted
    ],
    align=True,
)


@dataclass(frozen=True)
class StoredImages:
    """Images in device memory, from which the pixel op crops a batch's views itself.

    Attributes:
        images: uint8 [N, H, W, 3], RGB.
        sample_ids: Indices of the batch's images, int64 [B], on the same device.
        size_px: Side of the views.
    """

    images: Tensor
    sample_ids: Tensor
    size_px: int
