"""Accuracy with a few labels per class, the main use of an encoder trained without labels."""

# N training images, M test images, F features, n labels per class, C classes

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.logistic import class_scores
from fastssl.evaluation.task import Outcome, Task, rank_classes
from pipelines.progress import Progress
from pipelines.sampler import epoch_order

_CHUNK_ROWS = 4096


def check_few_label(cfg: EvalConfig, train_y: np.ndarray) -> None:
    """Refuse more labels per class than are available.

    Raises:
        ValueError: names the key.
    """
    classes, counts = np.unique(train_y, return_counts=True)
    most = max(cfg.few_labels, default=0)
    if counts.min() < most:
        scarce = classes[counts.argmin()]
        raise ValueError(
            f"eval.few_labels asks for {most} images per class, but class {scarce} has only {counts.min()}: lower it"
        )


def few_label(task: Task) -> dict[str, Outcome]:
    """Logistic regression (C = 1) and the nearest neighbour from n labelled training images of each class.

    No setting is tuned. Features and raw pixels are scaled in the same way: rows are centred by the training part's
    mean and divided by ONE standard deviation over all its values (no labels are used). Then the scale of an encoder's
    features does not matter, and no column is amplified, as nearly constant border pixels would be: on scikit-learn's
    digits, raw pixels score up to 5 points higher this way than standardised per column, and within half a point of the
    best of per-column standardisation, unit rows and levels in [0, 1]. The nearest neighbour is by Euclidean distance;
    this scaling does not change it.

    Draw d of the labelled images is the same in every call and for every kind of features.
    """
    check_few_label(task.cfg, task.train_y)
    mean = task.train_x.mean(0)
    scale = max(float((task.train_x - mean).std()), 1e-12)
    train_x, test_x = (task.train_x - mean) / scale, (task.test_x - mean) / scale
    num_fits = len(task.cfg.few_labels) * task.cfg.num_draws * len(_CLASSIFIERS)
    with task.progress("few_label", num_fits * len(test_x)) as progress:
        return _outcomes(task, train_x, test_x, progress)


def _outcomes(task: Task, train_x: np.ndarray, test_x: np.ndarray, progress: Progress) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for num_per_class in task.cfg.few_labels:
        draws = [draw_labelled(task.train_y, num_per_class, draw) for draw in range(task.cfg.num_draws)]
        for name, rank in _CLASSIFIERS.items():
            ranked = []
            for ids in draws:
                with threadpool_limits(1, user_api="blas"):  # as in logistic.py
                    ranked.append(rank(train_x[ids], task.train_y[ids], test_x, task.num_classes))
                progress.advance(len(test_x))
            settings = {"labels_per_class": num_per_class, "classifier": name}
            outcomes[_outcome_name(name, num_per_class)] = Outcome(
                ranked=ranked, chosen=settings, repeated_over="draws of the labelled images"
            )
    return outcomes


def few_label_names(cfg: EvalConfig) -> list[str]:
    """The names of the outcomes of `few_label`."""
    return [_outcome_name(name, num_per_class) for num_per_class in cfg.few_labels for name in _CLASSIFIERS]


def _outcome_name(classifier: str, num_per_class: int) -> str:
    return f"{classifier}_{num_per_class}_labels_per_class"


def draw_labelled(labels: np.ndarray, num_per_class: int, draw: int) -> np.ndarray:
    """Ids of n images of each class, int64 [C * n]: the first of each class in the draw's random order.

    Args:
        labels: int64 [N]; no class has fewer than n images.
        num_per_class: n.
        draw: Number of the draw.
    """
    order = epoch_order(np.arange(len(labels)), seed=draw, epoch=0)
    return np.concatenate([order[labels[order] == label][:num_per_class] for label in np.unique(labels)])


def _rank_by_logistic(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, num_classes: int) -> np.ndarray:
    model = LogisticRegression(C=1.0, max_iter=1000).fit(train_x, train_y)
    return rank_classes(class_scores(model, test_x, num_classes))


def _rank_by_distance(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, num_classes: int) -> np.ndarray:
    """Rank classes by the distance of their nearest labelled image."""
    labelled = torch.as_tensor(train_x)
    index = torch.as_tensor(train_y)
    nearest = []
    for chunk in torch.as_tensor(test_x).split(_CHUNK_ROWS):
        distances = torch.full((len(chunk), num_classes), torch.inf)
        nearest.append(distances.scatter_reduce_(1, index.expand(len(chunk), -1), torch.cdist(chunk, labelled), "amin"))
    return rank_classes(-torch.cat(nearest).numpy())


_CLASSIFIERS = {"logistic": _rank_by_logistic, "nearest": _rank_by_distance}
