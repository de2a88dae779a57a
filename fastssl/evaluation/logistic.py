"""Logistic regression on frozen features: the linear evaluation without a schedule to tune."""

# N training images, F features, C classes

import math
import time
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from fastssl.evaluation.cost import ITERATIONS, PATH_ITERATIONS, Sizes, is_path, iteration_s
from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation
from pipelines.progress import Progress

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strength of the L2 penalty; the loss is a sum over images
MAX_ITERATIONS = 1000
MAX_WIDENINGS = 2


def logistic(task: Task) -> dict[str, Outcome]:
    """Choose C on the validation part, fit the whole training part, and score the test part once."""
    sizes, num_images = Sizes.of_task(task), len(task.train_y)
    # L-BFGS makes thousands of small BLAS calls, for which a second thread only adds waiting (30 times slower next to
    # another busy process on 2 cores); with one thread the result does not depend on the number of cores.
    with threadpool_limits(1, user_api="blas"), task.progress("logistic", num_images) as progress:
        top1 = top1_by_c(
            task.train_x,
            task.train_y,
            progress,
            is_path=is_path(task.cfg, sizes),
            max_widenings=0 if task.cfg.search == "full" else MAX_WIDENINGS,
            fit_s=ITERATIONS * iteration_s(sizes),
        )
        c = best_c(top1)
        with progress.during(num_images, ITERATIONS * iteration_s(sizes)):
            model = fit_logistic(task.train_x, task.train_y, c)
        ranked = rank_classes(class_scores(model, task.test_x, task.num_classes))
    converged = int(model.named_steps["logistic"].n_iter_.max()) < MAX_ITERATIONS
    chosen = {"c": c, "validation_top1": top1[c], "converged": converged}
    chosen["at_edge_of_grid"] = ["c"] if c in (min(top1), max(top1)) else []
    return {"logistic": Outcome(ranked=[ranked], chosen=chosen)}


def top1_by_c(
    train_x: np.ndarray, train_y: np.ndarray, progress: Progress, *, is_path: bool, max_widenings: int, fit_s: float
) -> dict[float, float]:
    """Accuracy on the validation part of the values of C that were tried, from the strongest penalty to the weakest.

    Along a path, each fit starts from the one before and takes at most PATH_ITERATIONS iterations, and the path ends
    where the accuracy has passed its peak: the slowest fits, with the weakest penalties, are mostly left out.

    Args:
        train_x: Features [N, F].
        train_y: Labels int64 [N].
        progress: Counts the images of each fit.
        is_path: Whether to go along a path; otherwise all of C_GRID is fitted to the end.
        max_widenings: How often a value beyond the grid is tried where the best one is its first or last.
        fit_s: Seconds that the first fit is expected to take.
    """
    fit, validation = split_validation(train_y)
    scaler = StandardScaler().fit(train_x[fit]) if is_path else None
    path = LogisticRegression(max_iter=PATH_ITERATIONS, warm_start=True)
    if scaler is not None:
        fit_x, validation_x = scaler.transform(train_x[fit]), scaler.transform(train_x[validation])
    top1: dict[float, float] = {}

    def try_c(c: float) -> None:
        nonlocal fit_s
        if c not in C_GRID:
            progress.extend(len(fit))
        started_s = time.perf_counter()
        with progress.during(len(fit), fit_s):
            if scaler is None:
                model = fit_logistic(train_x[fit], train_y[fit], c)
                top1[c] = float(model.score(train_x[validation], train_y[validation]))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)  # it is not meant to converge
                    path.set_params(C=c).fit(fit_x, train_y[fit])
                top1[c] = float(path.score(validation_x, train_y[validation]))
        fit_s = time.perf_counter() - started_s

    progress.extend(len(fit) * len(C_GRID))
    for c in C_GRID:
        try_c(c)
        if is_path and _is_past_peak(list(top1.values()), len(validation)):
            break
    progress.extend(-len(fit) * (len(C_GRID) - len(top1)))
    for edge, step in ((max, 10.0), (min, 0.1)):
        for _ in range(max_widenings):
            if best_c(top1) != edge(top1):
                break
            try_c(float(f"{edge(top1) * step:.6g}"))
    return top1


def best_c(top1: Mapping[float, float]) -> float:
    """The C with the best accuracy; ties go to values of C_GRID, and to the smallest, the strongest penalty."""
    return max(top1, key=lambda c: (top1[c], c in C_GRID, -c))


def _is_past_peak(top1: Sequence[float], num_validation: int) -> bool:
    """Whether the last value is worse than the best one by more than a standard error, or the last two are worse."""
    best = max(top1)
    error = math.sqrt(best * (1 - best) / num_validation)
    return top1[-1] < best - error or max(top1[-2:]) < best


def fit_logistic(x: np.ndarray, y: np.ndarray, c: float) -> Pipeline:
    """Standardise and fit a multinomial logistic regression."""
    steps = [("scale", StandardScaler()), ("logistic", LogisticRegression(C=c, max_iter=MAX_ITERATIONS))]
    model = Pipeline(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # recorded in the outcome instead
        return model.fit(x, y)


def class_scores(model: LogisticRegression | Pipeline, x: np.ndarray, num_classes: int) -> np.ndarray:
    """Logits [M, C] of a fitted model; -inf for classes missing in its training data."""
    found = model.decision_function(x)
    if found.ndim == 1:  # for two classes scikit-learn returns the second's only
        found = np.stack([-found, found], 1)
    scores = np.full((len(x), num_classes), -np.inf)
    scores[:, model.classes_] = found
    return scores
