"""The pixel op: uint8 views and their drawn parameters to normalised tensors, ready for the network."""

# B samples, Vg views of one size, H and W height and width in pixels

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from kernels.augment.params import VIEW_PARAMS

if TYPE_CHECKING:
    import torch

    from kernels.augment.cpu import OutputPool

__all__ = ["VIEW_PARAMS", "augment"]

Impl = Literal["auto", "numba", "reference"]


def augment(
    views: np.ndarray,
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

    Order: affine, flip, jitter in its drawn order, grayscale, blur, solarize, normalise, cast. Each op is
    torchvision v2's on float32 in [0, 1], clamped as there. A blur kernel that v2's reflect padding cannot
    serve (kernel // 2 >= side) is cut to the largest that it can, 2 * side - 1.

    Args:
        views: Cropped and resized views, uint8 [B, Vg, H, W, 3], RGB.
        params: Their drawn parameters, VIEW_PARAMS [B, Vg]; the crop box is not read.
        mean: Per channel, in [0, 1] units.
        std: Per channel, in [0, 1] units, > 0.
        dtype: Of the result: float32 (None), bfloat16 or float16; the arithmetic is float32.
        impl: "reference" is torchvision, slow; "auto" is "numba".
        num_threads: Threads of "numba"; None: every core of this process. The result does not depend on it.
        outputs: Where "numba" takes its results' memory from; None: from numpy.
    Returns:
        Vg tensors [B, 3, H, W], channels-last in memory.
    Raises:
        ValueError: shapes or dtypes do not fit, std <= 0, num_threads < 1, or impl unknown.
    """
    import torch

    _check(views, params, mean, std, num_threads)
    if impl == "reference":
        from kernels.augment.reference import augment_reference

        out = augment_reference(views, params, mean, std)
    elif impl in ("auto", "numba"):
        from kernels.augment.cpu import OutputPool, augment_numba

        num_threads = num_threads or len(os.sched_getaffinity(0))
        out = augment_numba(views, params, mean, std, num_threads, outputs or OutputPool())
    else:
        raise ValueError(f"impl must be auto, numba or reference, got {impl!r}")
    return [view.permute(0, 3, 1, 2) for view in out.to(dtype or torch.float32)]


def _check(
    views: np.ndarray, params: np.ndarray, mean: Sequence[float], std: Sequence[float], num_threads: int | None
) -> None:
    if views.dtype != np.uint8 or views.ndim != 5 or views.shape[-1] != 3:
        raise ValueError(f"views must be uint8 [B, Vg, H, W, 3], got {views.dtype} {views.shape}")
    if params.dtype != VIEW_PARAMS or params.shape != views.shape[:2]:
        raise ValueError(f"params must be VIEW_PARAMS {views.shape[:2]}, got {params.dtype} {params.shape}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std need three numbers, std > 0; got {tuple(mean)} and {tuple(std)}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be >= 1, got {num_threads}")
