"""Diagnostics of the representation during training: how many directions it uses, and whether it collapses.

# B local batch, V views, F features, D projection; h [B, F] features, z [B, D] projections, u = z/|z|
# P = min(512, global batch) samples whose pairs are used: the first of the global batch
# n the number of samples of a window over all steps and ranks; sums are over both

| figure                 | what it is                                                              | source |
|------------------------|-------------------------------------------------------------------------|--------|
| `rankme_h`, `rankme_z` | exp of the entropy of the singular values of h, of u                    | [1] (1)-(2) |
| `lidar_z`              | the same of Sw^(-1/2) Sb Sw^(-1/2): Sb between samples, Sw within views | [2] (4)-(6) |
| `alpha_h`              | exponent of the power law that the eigenvalues of h's covariance follow | [3]    |
| `std_z`                | mean standard deviation of u's coordinates, times sqrt(D): 1 spread out | [4] 4.1 |
| `alignment_z`          | mean |u - u'|^2 of two views of a sample                                | [5] (1) |
| `uniformity_z`         | log mean exp(-2 |u_i - u_k|^2) of two samples                           | [5] (2) |
| `positive_similarity`  | mean u . u' of two views of a sample                                    |        |
| `negative_similarity`  | mean u_i . u_k of two samples                                           |        |

[1] RankMe, arXiv:2210.02885 [2] LiDAR, arXiv:2312.04000 [3] alpha-ReQ, arXiv:2202.05808 [4] SimSiam, arXiv:2011.10566
[5] Wang and Isola 2020, arXiv:2005.10242

LiDAR's authors draw tens of views per sample; with training's V views the value is lower, and only comparable between
runs of the same recipe.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import collectives

WINDOW_IMAGES = 2048  # the last images of an epoch: few enough that the network barely changes, more than most D
NUM_BINS = 40  # of similarities, from -1 to 1
_MAX_PAIRED = 512  # samples of a global batch whose pairs are used
_LIDAR_DELTA = 1e-4  # added to Sw's diagonal, arXiv:2312.04000
_ALPHA_FROM, _ALPHA_TO = 4, 100  # range of fitted eigenvalues, 1-based: the first few do not follow a power law
# A representation counts as collapsed if it is below one of these in two consecutive epochs.
COLLAPSE_THRESHOLDS = {"std_z": 0.1, "rankme_z": 2.0, "similarity_gap": 0.01}
MEANING = {
    "std_z": "the projections hardly differ from each other",
    "rankme_z": "the projections lie on a line",
    "similarity_gap": "views of one image are no more similar than those of different images",
}


@torch.no_grad()
def window_sums(h: list[Tensor], z: list[Tensor]) -> dict[str, Tensor]:
    """Sums that one step adds to a window, fp32 (fp64 for fp64 inputs), on the device, without synchronisation.

    Their sum over ranks does not depend on how the global batch is divided. All ranks call it, with equal shapes.

    Args:
        h: Features of each view [B, F].
        z: Projections of each view [B, D].
    """
    dtype = torch.float64 if z[0].dtype == torch.float64 else torch.float32
    features = torch.cat(h).to(dtype)
    u = F.normalize(torch.stack(z).to(dtype), dim=2)  # [V, B, D]
    rows, middle = u.flatten(0, 1), u.mean(0)
    apart = (u - middle).flatten(0, 1)
    num_samples = u.shape[1]
    start = collectives.rank() * num_samples  # of this rank's samples in the global batch
    some = u[:, : max(0, _MAX_PAIRED - start)]
    positive = torch.cat([(some[v] * some[w]).sum(1) for v in range(len(u)) for w in range(v)])
    others = rows.new_zeros(min(_MAX_PAIRED, num_samples * collectives.world_size()), rows.shape[1])  # [P, D]
    others[start : start + some.shape[1]] = some[1]
    similarity = some[0] @ collectives.EXCHANGE.sum_(others).T
    own = similarity.diagonal(start)  # pairs of the same sample, subtracted below
    return {
        "num_rows": rows.new_full((), len(rows)),
        "h": features.sum(0),
        "hh": features.T @ features,
        "u": rows.sum(0),
        "uu": rows.T @ rows,
        "middle": middle.sum(0),
        "middles": middle.T @ middle,
        "apart": apart.T @ apart,
        "num_positive": rows.new_full((), len(positive)),
        "positive": positive.sum(),
        "num_negative": rows.new_full((), similarity.numel() - len(own)),
        "negative": similarity.sum() - own.sum(),
        "potential": _potential(similarity) - _potential(own),
        "positive_counts": _histogram(positive),
        "negative_counts": _histogram(similarity.flatten()) - _histogram(own),
    }


def add_sums(total: dict[str, Tensor], sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of two windows; an empty one is {}."""
    return {name: total[name] + value for name, value in sums.items()} if total else sums


@torch.no_grad()
def representation_metrics(sums: dict[str, Tensor], num_views: int) -> dict[str, float]:
    """The metrics of the table above for a window, and `similarity_gap`, positive minus negative similarity.

    Args:
        sums: Sums over all steps and ranks.
        num_views: V.
    """
    n, num_samples = sums["num_rows"], sums["num_rows"] / num_views
    covariance_h = sums["hh"] / n - torch.outer(sums["h"], sums["h"]) / n**2
    variance_u = (sums["uu"].diagonal() / n - (sums["u"] / n).square()).clamp_min(0)
    between = sums["middles"] / num_samples - torch.outer(sums["middle"], sums["middle"]) / num_samples**2
    positive, negative = sums["positive"] / sums["num_positive"], sums["negative"] / sums["num_negative"]
    found = {
        "rankme_h": effective_rank(_eigenvalues(sums["hh"]).sqrt()),
        "rankme_z": effective_rank(_eigenvalues(sums["uu"]).sqrt()),
        "lidar_z": effective_rank(_eigenvalues(_whitened(between, sums["apart"] / n))),
        "alpha_h": power_law_exponent(_eigenvalues(covariance_h), int(n)),
        "std_z": math.sqrt(len(variance_u)) * variance_u.sqrt().mean(),
        "alignment_z": 2 - 2 * positive,
        "uniformity_z": (sums["potential"] / sums["num_negative"]).log(),
        "positive_similarity": positive,
        "negative_similarity": negative,
        "similarity_gap": positive - negative,
    }
    return {name: float(value) for name, value in found.items()}


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of values / sum(values), values >= 0 [num]; in [1, num] (Roy and Vetterli 2007)."""
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(p).sum().exp()


def power_law_exponent(eigenvalues: Tensor, num_rows: int) -> float:
    """Minus the slope of log eigenvalue over log rank, by least squares, over ranks 4 to 100 above rounding error.

    Args:
        eigenvalues: Descending [num].
        num_rows: Number of samples of the covariance, which limits its rank.
    Returns:
        The exponent; nan if fewer than three eigenvalues can be fitted.
    """
    least = eigenvalues[0] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    num = min(_ALPHA_TO, num_rows - 1, int((eigenvalues > least).sum()))
    if num - _ALPHA_FROM + 1 < 3:
        return math.nan
    ranks = torch.arange(_ALPHA_FROM, num + 1, dtype=torch.float64)
    x, y = ranks.log(), eigenvalues[_ALPHA_FROM - 1 : num].double().cpu().log()
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())


def update_alarm(since: dict[str, int], found: dict[str, float], epoch: int) -> list[str]:
    """The signals of a collapse that are on in this and the previous epoch, in words.

    Args:
        since: For each signal, the epoch since which it has been on; changed in place, saved in checkpoints.
        found: Result of `representation_metrics`.
        epoch: Number of the epoch, starting at 0.
    """
    for name, least in COLLAPSE_THRESHOLDS.items():
        if found[name] < least:
            since.setdefault(name, epoch)
        else:
            since.pop(name, None)
    return [
        f"{MEANING[name]} ({name} {found[name]:.3g}, below {COLLAPSE_THRESHOLDS[name]:g} since epoch {first + 1})"
        for name, first in since.items()
        if first < epoch
    ]


def _potential(similarities: Tensor) -> Tensor:
    """Sum of exp(-2 |u_i - u_k|^2) = exp(4 (u_i . u_k - 1))."""
    return (4 * (similarities - 1)).exp().sum()


def _histogram(similarities: Tensor) -> Tensor:
    """Counts in NUM_BINS equal bins from -1 to 1."""
    bins = ((similarities + 1) * (NUM_BINS / 2)).long().clamp(0, NUM_BINS - 1)
    return torch.zeros(NUM_BINS, dtype=similarities.dtype, device=bins.device).scatter_add_(
        0, bins, torch.ones_like(similarities)
    )


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix, descending, clamped to >= 0."""
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0).clamp_min(0)


def _whitened(between: Tensor, within: Tensor) -> Tensor:
    """Sw^(-1/2) Sb Sw^(-1/2)."""
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    root = (vectors / (values.clamp_min(0) + _LIDAR_DELTA).sqrt()) @ vectors.T
    return root @ between @ root
