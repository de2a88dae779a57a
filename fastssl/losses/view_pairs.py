"""What losses share that compare each view with a target of the other views.

# V views, of which the target network sees the first T (T = V where there is none); B local batch, D projection
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_rows(z: Tensor) -> Tensor:
    """Rows of norm 1 along the last dimension, fp32 (fp64 for fp64 rows)."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)


def ordered_pairs(num_views: int, num_targets: int) -> list[tuple[int, int]]:
    """(view, view of the target) for every two different views: both directions of two views.

    With crops of several sizes the target sees the large ones only, and every view is held against each of them
    (Caron et al. 2021, arXiv:2104.14294, Eq. 3).
    """
    return [(v, w) for v in range(num_views) for w in range(num_targets) if v != w]


def mean_cosine(p: Tensor, t: Tensor) -> Tensor:
    """Mean over `ordered_pairs` and over the batch of the cosine of p_v and t_w, 0-dim.

    Args:
        p: Predictions [V, B, D], any floating dtype.
        t: Targets [T, B, D]; without gradient, whatever they have.
    """
    with torch.autocast(p.device.type, enabled=False):
        u, t = unit_rows(p), unit_rows(t.detach())
        return torch.stack([(u[v] * t[w]).sum(1).mean() for v, w in ordered_pairs(len(u), len(t))]).mean()


def check_momentum(field: str, momentum: float, *, below_one: bool = False) -> None:
    """Refuse a momentum of a moving average that is outside of [0, 1], or of [0, 1) where the average must move.

    Raises:
        ValueError: Names `field`, a dotted config key.
    """
    if not (math.isfinite(momentum) and 0 <= momentum <= 1) or (below_one and momentum == 1):
        raise ValueError(f"{field}: must be in [0, 1{')' if below_one else ']'}, got {momentum}")


def check_weights(config: object, *names: str) -> None:
    """Refuse weights of terms that are negative or no numbers; the ValueError names the dotted config key."""
    for name in names:
        weight = getattr(config, name)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"loss.{name}: must be >= 0, got {weight}")
