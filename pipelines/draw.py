"""The draw: all random augmentation parameters of each view of each sample, drawn in one place.

`draw` is a pure function of (seed, epoch, sample id, view, op). Engines and the pixel op only apply the drawn
parameters, so the views do not depend on rank, world size, workers, engine or restarts.
"""

# B samples, V views; u are uniform numbers in [0, 1)

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernels.augment.params import BRIGHTNESS, CONTRAST, HUE, SATURATION, VIEW_PARAMS
from pipelines.philox import uniform
from pipelines.view_spec import EvalViewSpec, Range, ViewSpec

# The op's number in the counter (docs/adr/0002-counter-based-draw.md); must never be reused or renumbered.
_CROP_OP, _AFFINE_OP, _FLIP_OP, _JITTER_OP, _GRAYSCALE_OP, _BLUR_OP, _SOLARIZE_OP = range(7)
_ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), np.uint8)
# RandomResizedCrop's tries after the first, which usually fits: (first try, number of tries) computed together.
_MORE_CROP_TRIES = ((1, 2), (3, 7))


def draw(specs: Sequence[ViewSpec], seed: int, epoch: int, sample_ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Draw the parameters of every view of every sample of a batch.

    Row i depends only on (specs, seed, epoch, sample_ids[i], sizes[i]).

    Args:
        specs: One per view; the index is part of the random number's address.
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32).
        sample_ids: int64 [B].
        sizes: Height and width of the source images in pixels, [B, 2], >= 1.
    Returns:
        VIEW_PARAMS [B, V]; the fields of a disabled op are zero.
    Raises:
        ValueError: shapes differ, or the seed, the epoch or an id is out of range.
    """
    sample_ids, sizes = np.asarray(sample_ids), np.asarray(sizes, np.int64)
    if sizes.shape != (len(sample_ids), 2):
        raise ValueError(f"sizes must have shape ({len(sample_ids)}, 2), got {sizes.shape}")
    params = np.zeros((len(sample_ids), len(specs)), VIEW_PARAMS)
    for view, spec in enumerate(specs):

        def u(op: int, num: int, first_block: int = 0, rows: Any = slice(None), view: int = view) -> np.ndarray:
            return uniform(seed, epoch, sample_ids[rows], view, op, num, first_block)

        _draw_geometry(spec, u, sizes, params[:, view])
        _draw_colour(spec, u, params[:, view])
    return params


def eval_params(spec: EvalViewSpec, sizes: np.ndarray) -> np.ndarray:
    """Parameters of the deterministic view: a centred square of side round(min(h, w) * crop_fraction), all ops off.

    Args:
        spec: The eval view.
        sizes: Height and width of the source images in pixels, [B, 2].
    Returns:
        VIEW_PARAMS [B, 1].
    """
    sizes = np.asarray(sizes, np.int64)
    side = np.maximum(np.rint(sizes.min(1) * spec.crop_fraction).astype(np.int64), 1)
    params = np.zeros((len(sizes), 1), VIEW_PARAMS)
    params["crop_box"][:, 0] = np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], 1)
    return params


def _draw_geometry(spec: ViewSpec, u: Callable[..., np.ndarray], sizes: np.ndarray, out: np.ndarray) -> None:
    out["crop_box"][:, 2:] = sizes
    if spec.crop:
        out["crop_box"] = _draw_crop(spec, u, sizes)
    if spec.affine_p > 0:
        numbers = u(_AFFINE_OP, 7)
        on = out["affine"] = numbers[:, 0] < spec.affine_p
        out["affine_matrix"] = _affine_matrix(spec, numbers[:, 1:]) * on[:, None]
    if spec.flip_p > 0:
        out["flip"] = u(_FLIP_OP, 1)[:, 0] < spec.flip_p


def _draw_crop(spec: ViewSpec, u: Callable[..., np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """RandomResizedCrop: the first of ten tries that fits, else the central fallback crop; int64 [B, 4]."""
    boxes, fits = (each[:, 0] for each in _try_crops(spec, u(_CROP_OP, 4)[:, None], sizes))
    pending = np.flatnonzero(~fits)
    for first_try, num_tries in _MORE_CROP_TRIES:
        numbers = u(_CROP_OP, 4 * num_tries, first_try, pending).reshape(len(pending), num_tries, 4)
        tried, fits = _try_crops(spec, numbers, sizes[pending])
        found = fits.any(1)
        boxes[pending[found]] = tried[found, fits[found].argmax(1)]
        pending = pending[~found]
    boxes[pending] = _fallback_crop(spec, sizes[pending])
    return boxes


def _try_crops(spec: ViewSpec, u: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u [B, tries, 4] -> boxes int64 [B, tries, 4] and whether each fits, [B, tries]."""
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * _between(u[..., 0], spec.crop_scale)
    ratio = np.exp(_between(u[..., 1], (math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1]))))
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = np.floor(u[..., 2] * (height - h + 1)), np.floor(u[..., 3] * (width - w + 1))
    return np.stack([top.astype(np.int64), left.astype(np.int64), h, w], -1), fits


def _fallback_crop(spec: ViewSpec, sizes: np.ndarray) -> np.ndarray:
    """Largest central crop whose ratio is in range; at least one pixel, whereas torchvision may round to zero."""
    height, width = sizes[:, 0], sizes[:, 1]
    low, high = spec.crop_ratio
    h = np.where(width / height < low, np.rint(width / low).astype(np.int64), height)
    w = np.where(width / height > high, np.rint(height * high).astype(np.int64), width)
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], 1)


def _affine_matrix(spec: ViewSpec, u: np.ndarray) -> np.ndarray:
    """torchvision's inverse affine matrix (v2 `_get_inverse_affine_matrix`) in pixel indices; u [B, 6] -> [B, 6]."""
    angle = np.radians(_between(u[:, 0], (-spec.affine_degrees, spec.affine_degrees)))
    shift_px = spec.affine_translate_fraction * spec.size_px
    shift_x, shift_y = np.rint(_between(u[:, 1:3], (-shift_px, shift_px))).T
    scale = _between(u[:, 3], spec.affine_scale)
    shear_x, shear_y = np.radians(_between(u[:, 4:6], (-spec.affine_shear_degrees, spec.affine_shear_degrees))).T
    # rotation * shear_y * shear_x = [[a, b], [c, d]] with determinant 1
    a, c = np.cos(angle - shear_y) / np.cos(shear_y), np.sin(angle - shear_y) / np.cos(shear_y)
    b, d = -(a * np.tan(shear_x) + np.sin(angle)), np.cos(angle) - c * np.tan(shear_x)
    m0, m1, m3, m4 = d / scale, -b / scale, -c / scale, a / scale
    centre = (spec.size_px - 1) / 2
    m2 = centre - m0 * (centre + shift_x) - m1 * (centre + shift_y)
    m5 = centre - m3 * (centre + shift_x) - m4 * (centre + shift_y)
    return np.stack([m0, m1, m2, m3, m4, m5], 1)


def _draw_colour(spec: ViewSpec, u: Callable[..., np.ndarray], out: np.ndarray) -> None:
    if spec.jitter_p > 0:
        numbers = u(_JITTER_OP, 6)
        on = out["jitter"] = numbers[:, 0] < spec.jitter_p
        out["jitter_order"] = _ORDERS[(numbers[:, 1] * len(_ORDERS)).astype(np.int64)] * on[:, None]
        out["jitter_factor"] = _jitter_factors(spec, numbers[:, 2:]) * on[:, None]
    if spec.grayscale_p > 0:
        out["grayscale"] = u(_GRAYSCALE_OP, 1)[:, 0] < spec.grayscale_p
    if spec.blur_p > 0:
        numbers = u(_BLUR_OP, 2)
        on = numbers[:, 0] < spec.blur_p
        out["blur_sigma"] = _between(numbers[:, 1], spec.blur_sigma) * on
        out["blur_kernel_px"] = spec.blur_kernel_px * on
    if spec.solarize_p > 0:
        on = out["solarize"] = u(_SOLARIZE_OP, 1)[:, 0] < spec.solarize_p
        out["solarize_threshold"] = spec.solarize_threshold * on


def _jitter_factors(spec: ViewSpec, u: np.ndarray) -> np.ndarray:
    """u [B, 4] -> factors [B, 4] by op code."""
    factors = np.empty_like(u)
    for op, strength in ((BRIGHTNESS, spec.brightness), (CONTRAST, spec.contrast), (SATURATION, spec.saturation)):
        factors[:, op] = _between(u[:, op], (max(0.0, 1 - strength), 1 + strength))
    factors[:, HUE] = _between(u[:, HUE], (-spec.hue, spec.hue))
    return factors


def _between(u: np.ndarray, limits: Range) -> np.ndarray:
    return limits[0] + u * (limits[1] - limits[0])
