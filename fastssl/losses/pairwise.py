"""What losses over all pairs of the global batch share: their input, and the checks of their settings.

# B local batch, N global batch, D projection; a rank holds the 2B rows z = [view a; view b], all ranks 2N
# u_i = z_i / |z_i|;  s_ik = u_i . u_k;  p(i) the other view of row i;  Neg(i) every row but i and p(i): 2N - 2 of them
"""

import math

import torch
from torch import Tensor

from fastssl import dist
from kernels.similarity import IMPLS
from kernels.similarity.exponent import MAX_EXP_INV_TEMPERATURE


def stack_views(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Both views as one tensor [2, B, D], in the dtype that they have, also under autocast.

    Args:
        z_a: Projections of view a [B, D], any floating dtype.
        z_b: Same for view b; row i is the positive of z_a[i].

    Raises:
        ValueError: Not 2-D, shapes or dtypes differ, no floating dtype, or fewer than two samples over all ranks.
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"z_a and z_b must both be [B, D], got {list(z_a.shape)} and {list(z_b.shape)}")
    if z_a.dtype != z_b.dtype or not z_a.is_floating_point():
        raise ValueError(f"z_a and z_b must have one floating dtype, got {z_a.dtype} and {z_b.dtype}")
    if len(z_a) * dist.world_size() < 2:
        raise ValueError(f"negatives need a global batch of at least 2 samples, got {len(z_a) * dist.world_size()}")
    with torch.autocast(z_a.device.type, enabled=False):  # autocast knows its own low precision only
        return torch.stack([z_a, z_b])


def check_temperature(field: str, temperature: float, *, of_exp: bool) -> None:
    """Refuse a temperature that is not a positive number, or at which e^{s/temperature} leaves fp32's range.

    Raises:
        ValueError: Names `field`, a dotted config key.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{field}: must be > 0, got {temperature}")
    if of_exp and 1 / temperature > MAX_EXP_INV_TEMPERATURE:
        lowest = math.ceil(1e4 / MAX_EXP_INV_TEMPERATURE) / 1e4
        raise ValueError(f"{field}: must be >= {lowest:g}, got {temperature}; e^(s/temperature) leaves fp32's range")


def check_impl(impl: str) -> None:
    """Refuse an unknown `loss.impl` with a ValueError."""
    if impl not in IMPLS:
        raise ValueError(f"loss.impl: must be one of {', '.join(IMPLS)}, got {impl!r}")
