"""Crop: torchvision's RandomResizedCrop; an engine cuts the box out and resizes it to the view's size."""

# B samples; u are uniform numbers in [0, 1)

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.augment.ops.base import Field, Op, between, positive_range

# RandomResizedCrop's tries after the first, which usually fits: (first try, number of tries) computed together.
_MORE_TRIES = ((1, 2), (3, 7))


def draw_boxes(spec: Any, u: Callable[..., np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """The first of ten tries that fits, else the central fallback crop.

    Args:
        spec: The view's.
        u: (num, first_block, rows) -> numbers of the crop's stream, [rows, num]; try t is block t.
        sizes: Height and width of the source images in pixels, int64 [B, 2].
    Returns:
        Top, left, height, width in pixels, int64 [B, 4].
    """
    if not spec.crop:
        return np.concatenate([np.zeros_like(sizes), sizes], 1)
    boxes, fits = (each[:, 0] for each in _try_crops(spec, u(4)[:, None], sizes))
    pending = np.flatnonzero(~fits)
    for first_try, num_tries in _MORE_TRIES:
        numbers = u(4 * num_tries, first_try, pending).reshape(len(pending), num_tries, 4)
        tried, fits = _try_crops(spec, numbers, sizes[pending])
        found = fits.any(1)
        boxes[pending[found]] = tried[found, fits[found].argmax(1)]
        pending = pending[~found]
    boxes[pending] = _fallback_crop(spec, sizes[pending])
    return boxes


def _try_crops(spec: Any, u: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u [B, tries, 4] -> boxes int64 [B, tries, 4] and whether each fits, [B, tries]."""
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * between(u[..., 0], spec.crop_scale)
    ratio = np.exp(between(u[..., 1], (math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1]))))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = np.floor(u[..., 2] * (height - h + 1)), np.floor(u[..., 3] * (width - w + 1))
    return np.stack([top.astype(np.int64), left.astype(np.int64), h, w], -1), fits


def _fallback_crop(spec: Any, sizes: np.ndarray) -> np.ndarray:
    """Largest central crop whose ratio is in range; at least one pixel, whereas torchvision may round to zero."""
    height, width = sizes[:, 0], sizes[:, 1]
    low, high = spec.crop_ratio
    h = np.where(width / height < low, np.rint(width / low).astype(np.int64), height)
    w = np.where(width / height > high, np.rint(height * high).astype(np.int64), width)
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)


CROP = Op(
    name="crop",
    number=0,
    fields={
        "crop": Field(True),  # False: the whole image is resized
        # share of the image's area
        "crop_scale": Field((0.2, 1.0), "[1e-6, 1]"),
        "crop_ratio": positive_range(3 / 4, 4 / 3),  # width / height
    },
    params=(("crop_box", np.int32, (4,)),),  # top, left, height, width in pixels of the source image
    reference=lambda image, _record, _v2: image,  # already cropped
)
