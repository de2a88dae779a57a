"""Inputs of the pixel op: the drawn parameters of each view, and stored images from which it crops views itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kernels.augment.ops import OPS

if TYPE_CHECKING:
    from torch import Tensor

# One record per view, as written by `pipelines.views.draw`. An op that is off is marked as off and its fields are zero,
# so that an implementation can skip it and still equal the reference.
VIEW_PARAMS = np.dtype([param for op in OPS for param in op.params], align=True)


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
