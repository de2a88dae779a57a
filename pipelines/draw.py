"""The draw: all random augmentation parameters of each view of each sample, drawn in one place.

`draw` is a pure function of (seed, epoch, sample id, view, op). Engines and the pixel op only apply the drawn
parameters, so the views do not depend on rank, world size, workers, engine or restarts.
"""

# B samples, V views; u are uniform numbers in [0, 1)

from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels.augment.ops import OPS
from kernels.augment.ops.crop import CROP, draw_boxes
from kernels.augment.params import VIEW_PARAMS
from pipelines.philox import uniform
from pipelines.view_spec import EvalViewSpec, ViewSpec


def draw(
    specs: Sequence[ViewSpec], seed: int, epoch: int | np.ndarray, sample_ids: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Draw the parameters of every view of every sample of a batch.

    Row i depends only on (specs, seed, epoch, sample_ids[i], sizes[i]).

    Args:
        specs: One per view; the index is part of the random number's address.
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32), of all samples, or of each, int64 [B].
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
    for view, (spec, out) in enumerate(zip(specs, params.T, strict=True)):

        def u_of_crop(num: int, first_block: int = 0, rows: Any = slice(None), view: int = view) -> np.ndarray:
            at = epoch[rows] if isinstance(epoch, np.ndarray) else epoch
            return uniform(seed, at, sample_ids[rows], view, CROP.number, num, first_block)

        out["crop_box"] = draw_boxes(spec, u_of_crop, sizes)
        for op in OPS:
            if op is CROP or (p := getattr(spec, f"{op.name}_p")) == 0:
                continue
            u = uniform(seed, epoch, sample_ids, view, op.number, 1 + op.num_draws)
            on = u[:, 0] < p
            for name, values in ({op.gate: True} | op.draw(spec, u[:, 1:])).items():
                out[name] = (np.asarray(values).T * on).T
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
