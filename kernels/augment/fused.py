"""The pixel op in Triton: at most two reads of a view's levels and one write of its result.

# B samples, Vg views of one size, N = B Vg, H and W height and width in pixels, R the blur's radius in pixels

The first kernel sums the grey of each view after the ops before contrast, only for views with contrast. The second
kernel applies all ops. A program processes a block of rows. If the view is blurred, the program also computes R rows
above and below, in its own scratch memory, and sums the taps from there: along the rows, then across them. The scratch
memory is reused for the next block, so that it stays in the device's L2 cache.

With `StoredImages` instead of views, a level is resampled from the image when it is needed: crop, antialiased resize
and rounding to a level, as in every engine.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from triton import knobs

from kernels.augment import augment_kernels as triton_kernels
from kernels.augment.ops.jitter import CONTRAST
from kernels.augment.params import StoredImages

BLOCK_PX = 1024  # pixels per step of a program. Other values of these constants are untested on GPUs (augment_gpu.csv).
BLOCK_ROWS = 32
CHUNKS = 8  # number of chunks per view in the sum of its grey
NUM_WARPS = 8
PROGRAMS_PER_MULTIPROCESSOR = 2
# Weights beyond this are dropped: 2e-6 of the total, as in kernels/augment/loops/blur_float32.py.
RADIUS_IN_SIGMAS = 4.8


def augment_fused(
    views: Tensor | StoredImages, params: np.ndarray, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Apply all ops to all views; arguments as in `augment`.

    Returns:
        `dtype` [Vg, B, H, W, 3], on the views' device.
    Raises:
        ValueError: the views are not on a CUDA device, and Triton is not in interpreter mode.
    """
    stored = views if isinstance(views, StoredImages) else None
    pixels = (stored.images if stored else cast(Tensor, views)).contiguous()
    if pixels.device.type != "cuda" and not knobs.runtime.interpret:
        where = f"the views are on {pixels.device}"
        raise ValueError(f"impl fused: it needs a CUDA device (or TRITON_INTERPRET=1 in the environment), {where}")
    num_samples, num_views = params.shape
    height, width = (stored.size_px, stored.size_px) if stored else views.shape[2:4]  # pyright: ignore
    out = torch.empty((num_views, num_samples, height, width, 3), dtype=dtype, device=pixels.device)
    if not out.numel():
        return out
    records = pack_records(params, height, width)
    max_radius = int(records[..., triton_kernels.RADIUS.value].max())
    has_contrast = bool((records[..., triton_kernels.CONTRAST_AT.value] < 4).any())
    taps_y, taps_x = _num_taps(params, stored)
    numbers = np.concatenate([records.reshape(-1), 1 / np.asarray(std), -np.asarray(mean) / np.asarray(std)])
    on_device = _to_device(numbers.astype(np.float32), pixels.device)
    records_at, scales, shifts = on_device[:-6], on_device[-6:-3], on_device[-3:]
    image_ids = stored.sample_ids if stored else None
    num_blocks = -(-height // BLOCK_ROWS)
    num_tasks = num_samples * num_views * num_blocks
    num_programs = min(num_tasks, _num_programs(pixels.device))
    plane_size = (min(BLOCK_ROWS, height) + 2 * max_radius) * width if max_radius else 0
    scratch = torch.empty(num_programs * 6 * plane_size, dtype=torch.float32, device=pixels.device)
    sums = torch.empty((num_samples * num_views, CHUNKS) if has_contrast else 0, device=pixels.device)
    image_width, num_levels = pixels.shape[-2], math.prod(pixels.shape[-3:])
    constants = {
        "NUM_FIELDS": triton_kernels.FIELDS.value, "STORED": stored is not None, "CHUNKS": CHUNKS, "BLOCK": BLOCK_PX,
        "num_warps": NUM_WARPS,
    }  # fmt: skip
    with torch.cuda.device_of(pixels):  # Triton launches on the current device
        if has_contrast:
            cast(Any, triton_kernels.sum_grey)[num_samples * num_views, CHUNKS](
                pixels, image_ids, records_at, sums, num_views, height, width, image_width, num_levels, taps_y, taps_x,
                -(-height * width // CHUNKS), **constants,
            )  # fmt: skip
        cast(Any, triton_kernels.augment_rows)[(num_programs,)](
            pixels, image_ids, records_at, sums, scales, shifts, scratch, out,
            num_tasks, num_blocks, num_samples, num_views, height, width, image_width, num_levels, taps_y, taps_x,
            BLOCK_ROWS, plane_size, **constants,
        )  # fmt: skip
    return out


def pack_records(params: np.ndarray, height: int, width: int) -> np.ndarray:
    """VIEW_PARAMS [B, Vg] -> float32 [B, Vg, FIELDS]: records read by the kernels, with neutral values for ops off."""
    at = triton_kernels
    records = np.zeros((*params.shape, at.FIELDS.value), np.float32)
    jitter = params["jitter"][..., None]
    order = np.where(jitter, params["jitter_order"], np.arange(4))
    factor = np.where(jitter, params["jitter_factor"], (1, 1, 1, 0))
    contrast_at = np.where(factor[..., CONTRAST] != 1, (order == CONTRAST).argmax(-1), 4)
    # A blur kernel too large for reflection at the borders is reduced, as in `augment`.
    radius = np.minimum(params["blur_kernel_px"] // 2, min(height, width) - 1)
    radius = np.minimum(radius, np.floor(RADIUS_IN_SIGMAS * params["blur_sigma"]) + 1) * (params["blur_sigma"] > 0)
    for place, values in (
        (at.BOX, params["crop_box"]),
        (at.AFFINE, params["affine"]),
        (at.AFFINE + 1, params["affine_matrix"]),
        (at.FLIP, params["flip"]),
        (at.ORDER, order),
        (at.FACTOR, factor),
        (at.CONTRAST_AT, contrast_at),
        (at.RADIUS, radius),
        (at.SIGMA, np.where(radius > 0, params["blur_sigma"], 1)),
        *((int(at.POINTWISE) + i, params[name]) for i, name in enumerate(at.POINTWISE_PARAMS)),
    ):
        values = values if values.ndim == 3 else values[..., None]
        records[..., int(place) : int(place) + values.shape[-1]] = values
    return records


def _num_taps(params: np.ndarray, stored: StoredImages | None) -> tuple[int, int]:
    """Number of taps of the triangle filter along height and width for the largest boxes."""
    if stored is None:
        return 0, 0
    sides_px = params["crop_box"][..., 2:].reshape(-1, 2).max(0)
    taps_y, taps_x = (2 * math.ceil(max(side_px / stored.size_px, 1)) for side_px in sides_px.tolist())
    return taps_y, taps_x


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
