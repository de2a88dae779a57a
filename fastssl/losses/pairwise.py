"""Shared by losses over all pairs of the global batch: input checks and bounds of their settings.

# B local batch, N global batch, D projection; a rank holds the 2B rows z = [view a; view b], all ranks 2N
# u_i = z_i / |z_i|;  s_ik = u_i . u_k;  p(i) the other view of row i;  Neg(i) all rows but i and p(i): 2N - 2 of them
# With V views (multi-crop) every pair of views of a sample is a positive pair, and Neg(i) has V (N - 1) rows.
"""

import math

import torch
from torch import Tensor

from fastssl import collectives
from kernels.similarity.exponent import MAX_EXP_INV_TEMPERATURE

LOWEST_EXP_TEMPERATURE = math.ceil(1e4 / MAX_EXP_INV_TEMPERATURE) / 1e4  # e^{s/temperature} is within fp32's range
TEMPERATURE, EXP_TEMPERATURE = "[1e-4, 1e4]", f"[{LOWEST_EXP_TEMPERATURE}, 1e4]"  # intervals of `setting`


def stack_views(*z: Tensor) -> Tensor:
    """All views as one tensor [V, B, D], with their dtype unchanged, also under autocast.

    Args:
        z: Projections of each view [B, D], any floating dtype; row i of every view comes from the same sample.

    Raises:
        ValueError: Fewer than two views, not 2-D, shapes or dtypes differ, no floating dtype, or fewer than two samples
            over all ranks.
    """
    shapes, dtypes = [list(each.shape) for each in z], [each.dtype for each in z]
    if len(z) < 2:
        raise ValueError(f"the loss needs at least two views, got {len(z)}")
    if z[0].ndim != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"all views must have the same shape [B, D], got {', '.join(map(str, shapes))}")
    if len(set(dtypes)) > 1 or not z[0].is_floating_point():
        raise ValueError(f"all views must have the same floating dtype, got {', '.join(map(str, dtypes))}")
    num_samples = len(z[0]) * collectives.world_size()
    if num_samples < 2:
        raise ValueError(f"the global batch must have at least 2 samples, got {num_samples}")
    with torch.autocast(z[0].device.type, enabled=False):  # autocast would cast to its own low precision
        return torch.stack(z)
