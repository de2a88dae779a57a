"""The pixel op: turns uint8 views and their drawn parameters into normalised tensors, ready for the network."""

# B samples, Vg views of one size, H and W height and width in pixels

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from kernels.augment.params import VIEW_PARAMS, StoredImages

if TYPE_CHECKING:
    import torch

    from kernels.augment.cpu import OutputPool

__all__ = ["VIEW_PARAMS", "StoredImages", "augment"]

Impl = Literal["auto", "numba", "fused", "reference"]


def augment(
    views: np.ndarray | torch.Tensor | StoredImages,
    params: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
    num_threads: int | None = None,
    outputs: OutputPool | None = None,
) -> list[torch.Tensor]:
    """Apply the drawn ops of every view, normalise and cast.

    Order: the ops in that of `kernels.augment.ops.OPS`, normalise, cast. Each op is torchvision v2's on float32 in
    [0, 1], with the same clamping. A blur kernel too large for v2's reflect padding (kernel // 2 >= side) is reduced to
    the largest possible one, 2 * side - 1. On CPUs with AVX2, "numba" blurs in 16-bit integers if sigma <= 2 px, which
    differs from float32 by at most .05 levels of 255 before normalisation (`kernels.augment.cpu.BLUR_DTYPE`).

    Args:
        views: Cropped and resized views, uint8 [B, Vg, H, W, 3], RGB: an array, or a tensor on the device; or the
            images ("fused" only), from which the views are cropped as an engine does.
        params: Their drawn parameters, VIEW_PARAMS [B, Vg]; the crop box is read for images only.
        mean: Per channel, in [0, 1] units.
        std: Per channel, in [0, 1] units, > 0.
        dtype: The result's dtype: float32 (None), bfloat16 or float16; the arithmetic is float32.
        impl: "fused" is Triton, on the views' device; "numba" is for the CPU; "reference" is torchvision, slow.
            "auto" is "numba" for arrays and "fused" otherwise.
        num_threads: Threads of "numba"; None: every core of this process. The result does not depend on it.
        outputs: The pool from which "numba" allocates its results; None: allocate with numpy.
    Returns:
        Vg tensors [B, 3, H, W], channels-last in memory, on the views' device.
    Raises:
        ValueError: shapes or dtypes do not fit, std <= 0, num_threads < 1, or impl unknown.
    """
    import torch

    _check(views, params, mean, std, num_threads)
    if impl == "auto":
        impl = "numba" if isinstance(views, np.ndarray) else "fused"
    if impl == "fused":
        from kernels.augment.fused import augment_fused

        views = torch.from_numpy(views) if isinstance(views, np.ndarray) else views
        out = augment_fused(views, params, mean, std, dtype or torch.float32)
    elif impl not in ("numba", "reference"):
        raise ValueError(f"impl must be auto, numba, fused or reference, got {impl!r}")
    elif not isinstance(views, np.ndarray):
        raise ValueError(f"impl {impl} takes views as an array, got a {type(views).__name__}")
    elif impl == "reference":
        from kernels.augment.reference import augment_reference

        out = augment_reference(views, params, mean, std)
    else:
        from kernels.augment.cpu import OutputPool, augment_numba

        num_threads = num_threads or len(os.sched_getaffinity(0))
        out = torch.from_numpy(augment_numba(views, params, mean, std, num_threads, outputs or OutputPool()))
    return [view.permute(0, 3, 1, 2) for view in out.to(dtype or torch.float32)]


def _check(
    views: np.ndarray | torch.Tensor | StoredImages,
    params: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    num_threads: int | None,
) -> None:
    shape, dtype, wanted = tuple(params.shape), "uint8", "views must be uint8 [B, Vg, H, W, 3]"
    if isinstance(views, StoredImages):
        found, wanted = views.images, "images must be uint8 [N, H, W, 3]"
        shape = (len(views.sample_ids), *shape[1:])
        fits = found.ndim == 4 and views.size_px >= 1
    else:
        found = views
        shape = tuple(views.shape[:2])
        fits = found.ndim == 5
    if str(found.dtype).removeprefix("torch.") != dtype or not fits or found.shape[-1] != 3:
        raise ValueError(f"{wanted}, got {found.dtype} {tuple(found.shape)}")
    if params.dtype != VIEW_PARAMS or params.ndim != 2 or params.shape != shape:
        raise ValueError(f"params must be VIEW_PARAMS {shape}, got {params.dtype} {params.shape}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std need three numbers, std > 0; got {tuple(mean)} and {tuple(std)}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be >= 1, got {num_threads}")
