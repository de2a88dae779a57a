"""Accuracy with a few labels per class: what an encoder without labels is for."""

# N training images, M test images, F features, n labels per class, C classes

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from pipelines.sampler import epoch_order

_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class FewLabelResult:
    """Accuracy, as fractions, over the draws: mean and sample standard deviation (0 for one draw)."""

    logistic_mean: float
    logistic_sd: float
    nearest_mean: float
    nearest_sd: float


def evaluate_few_labels(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    num_per_class: int,
    num_draws: int = 10,
) -> FewLabelResult:
    """Logistic regression (C = 1) and the nearest neighbour from n labelled training images of each class.

    One convention for features and raw pixels alike: rows are centred by the training part's mean and divided by
    ONE standard deviation over all its values (no labels are used). The scale of an encoder's features then does
    not matter, and no column is blown up as pixels at the border would be: on scikit-learn's digits raw pixels
    score up to 5 points higher this way than standardised column by column, and within half a point of the
    best among that, unit rows and levels in [0, 1]. The neighbour is the nearest in Euclidean distance, which
    the convention leaves as it is.

    Args:
        train_x: Features [N, F]; the labelled images are drawn from them.
        train_y: Labels int64 [N].
        test_x: Features [M, F].
        test_y: Labels int64 [M].
        num_per_class: n.
        num_draws: Draws; draw d is the same in every call and for every kind of features.

    Raises:
        ValueError: a class has fewer than n training images.
    """
    mean = train_x.mean(0)
    scale = max(float((train_x - mean).std()), 1e-12)
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    logistic, nearest = [], []
    for draw in range(num_draws):
        ids = draw_labelled(train_y, num_per_class, draw)
        logistic.append(np.mean(_logistic_predict(train_x[ids], train_y[ids], test_x) == test_y))
        nearest.append(np.mean(_nearest_predict(train_x[ids], train_y[ids], test_x) == test_y))
    return FewLabelResult(
        logistic_mean=float(np.mean(logistic)),
        logistic_sd=_sd(logistic),
        nearest_mean=float(np.mean(nearest)),
        nearest_sd=_sd(nearest),
    )


def draw_labelled(labels: np.ndarray, num_per_class: int, draw: int) -> np.ndarray:
    """Ids of n images of each class, int64 [C * n]: the first of each class in the draw's random order.

    Raises:
        ValueError: a class has fewer than n images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < num_per_class:
        scarce = classes[counts.argmin()]
        raise ValueError(
            f"eval.few_labels: class {scarce} has {counts.min()} training images, {num_per_class} are asked for"
        )
    order = epoch_order(np.arange(len(labels)), seed=draw, epoch=0)
    return np.concatenate([order[labels[order] == label][:num_per_class] for label in classes])


def _logistic_predict(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    return LogisticRegression(C=1.0, max_iter=1000).fit(train_x, train_y).predict(test_x)


def _nearest_predict(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    labelled = torch.as_tensor(train_x)
    nearest = [torch.cdist(chunk, labelled).argmin(1) for chunk in torch.as_tensor(test_x).split(_CHUNK_ROWS)]
    return train_y[torch.cat(nearest).numpy()]


def _sd(values: list[np.floating]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
