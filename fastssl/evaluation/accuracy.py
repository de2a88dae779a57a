"""Accuracy and its confidence intervals. The only place that reads test labels."""

# M test images, C classes, R ranked classes, S repetitions

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev
from typing import Any

import numpy as np
from scipy.special import stdtrit

from fastssl.evaluation.task import NUM_RANKED

CONFIDENCE = 0.95
Interval = tuple[float, float]


def judge(ranked: Sequence[np.ndarray], test_y: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Compare a protocol's predictions with the test labels.

    Args:
        ranked: For each of S repetitions, the ranked classes, int64 [M, R].
        test_y: Labels int64 [M].
        num_classes: C.

    Returns:
        JSON values, accuracies as fractions: top1 and top5 (means over the repetitions; top5 is None if C <= 5,
        where it would be 1), top1_each, top1_sd (None for one repetition), per_class (mean top-1 of each class; None
        for a class without test images), interval95_repetitions (None for one repetition) and interval95_test_images.
    """
    hits = np.stack([answer == test_y[:, None] for answer in ranked])
    first = hits[:, :, 0]
    top1_each = [float(top1) for top1 in first.mean(1)]
    counts = np.bincount(test_y, minlength=num_classes)
    hits_of_class = np.bincount(test_y, weights=first.mean(0), minlength=num_classes)
    top1 = mean(top1_each)
    return {
        "top1": top1,
        "top5": float(hits.any(2).mean()) if num_classes > NUM_RANKED else None,
        "top1_each": top1_each,
        "top1_sd": float(np.std(top1_each, ddof=1)) if len(top1_each) > 1 else None,
        "interval95_repetitions": t_interval(top1_each),
        "interval95_test_images": wilson_interval(top1, len(test_y)),
        "num_test_images": len(test_y),
        "per_class": [float(h / n) if n else None for h, n in zip(hits_of_class, counts, strict=True)],
    }


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's confidence interval for the mean of independent, normal values; None for a single value.

    mean -+ t(n - 1) s / sqrt(n), Student 1908, "The probable error of a mean", Biometrika 6.
    """
    num = len(values)
    if num < 2:
        return None
    half = float(stdtrit(num - 1, (1 + CONFIDENCE) / 2)) * float(np.std(values, ddof=1)) / math.sqrt(num)
    return mean(values) - half, mean(values) + half


def over_seeds(percents: Sequence[float], *, is_exact: bool = False) -> dict[str, Any]:
    """Columns of a table: mean, standard deviation and Student's interval of runs that differ only in their seed.

    Args:
        percents: One value per seed; for a single value, deviation and interval are None.
        is_exact: Do not round to two decimals, and give the interval as its two ends instead of as text.
    """
    interval = t_interval(percents)
    if is_exact:
        deviation = stdev(percents) if len(percents) > 1 else None
        found = {"mean_percent": mean(percents), "sd_over_seeds": deviation, "interval95_over_seeds": interval}
        return found | {"num_seeds": len(percents)}
    return {
        "mean_percent": round(mean(percents), 2),
        "sd_over_seeds": round(stdev(percents), 2) if len(percents) > 1 else None,
        "interval95_over_seeds": None if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
        "num_seeds": len(percents),
    }


def wilson_interval(fraction: float, num: int) -> Interval:
    """The Wilson score interval of a success fraction in `num` independent trials.

    Wilson 1927, "Probable inference", J. Am. Stat. Assoc. 22, p. 209: the probabilities p with
    |fraction - p| <= z sqrt(p (1 - p) / num).

    Args:
        fraction: In [0, 1].
        num: >= 1.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (fraction + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(fraction * (1 - fraction) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)
