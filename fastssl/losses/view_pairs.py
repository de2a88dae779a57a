"""Shared by losses that compare each view with a target computed from the other views.

# V views; the target network sees the first T of them (T = V without a target network); B local batch, D projection
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.similarity.rows import widen


def unit_rows(z: Tensor) -> Tensor:
    """Rows of norm 1 along the last dimension, fp32 (fp64 for fp64 rows)."""
    return F.normalize(widen(z), dim=-1)


def ordered_pairs(num_views: int, num_targets: int) -> list[tuple[int, int]]:
    """(view, view of the target) for all ordered pairs of different views; for two views, both directions.

    With crops of several sizes the target sees only the large ones, and every view is compared with each of them
    (Caron et al. 2021, arXiv:2104.14294, Eq. 3).
    """
    return [(v, w) for v in range(num_views) for w in range(num_targets) if v != w]


def mean_cosine(p: Tensor, t: Tensor) -> Tensor:
    """Mean over `ordered_pairs` and over the batch of the cosine of p_v and t_w, 0-dim.

    Args:
        p: Predictions [V, B, D], any floating dtype.
        t: Targets [T, B, D]; detached inside.
    """
    with torch.autocast(p.device.type, enabled=False):
        u, t = unit_rows(p), unit_rows(t.detach())
        return torch.stack([(u[v] * t[w]).sum(1).mean() for v, w in ordered_pairs(len(u), len(t))]).mean()
