"""Logistic regression on frozen features: the linear evaluation without a schedule to tune."""

# N training images, F features

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.sampler import split_holdout

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strength of the L2 penalty, on a sum over the images
HOLDOUT_FRACTION = 0.1
MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class LogisticResult:
    """Outcome of one evaluation.

    Attributes:
        top1: Accuracy on the test part, a fraction.
        c: The C chosen on the held-out tenth of the training part.
        converged: Whether the last fit ended before MAX_ITERATIONS.
    """

    top1: float
    c: float
    converged: bool


def evaluate_logistic(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray
) -> LogisticResult:
    """Choose C on a held-out tenth of the training part, fit all of it, and score the test part once.

    Args:
        train_x: Features [N, F], standardised inside by the statistics of what is fitted.
        train_y: Labels int64 [N].
        test_x: Features [M, F].
        test_y: Labels int64 [M].

    Raises:
        ValueError: fewer than 10 training images, or fewer than two classes among those to fit.
    """
    c = choose_c(train_x, train_y)
    model = fit_logistic(train_x, train_y, c)
    converged = int(model.named_steps["logistic"].n_iter_.max()) < MAX_ITERATIONS
    return LogisticResult(top1=float(model.score(test_x, test_y)), c=c, converged=converged)


def choose_c(train_x: np.ndarray, train_y: np.ndarray) -> float:
    """The C of C_GRID with the best accuracy on a fixed, stratified tenth of the training part.

    Equal ones: the smallest, the strongest penalty.
    """
    if len(train_x) < 10:
        raise ValueError(f"logistic regression needs at least 10 training images, not {len(train_x)}")
    fit_ids, holdout_ids = split_holdout(len(train_x), HOLDOUT_FRACTION, train_y)

    def holdout_top1(c: float) -> float:
        return fit_logistic(train_x[fit_ids], train_y[fit_ids], c).score(train_x[holdout_ids], train_y[holdout_ids])

    return max(C_GRID, key=holdout_top1)


def fit_logistic(x: np.ndarray, y: np.ndarray, c: float) -> Pipeline:
    """Standardise and fit a multinomial logistic regression."""
    steps = [("scale", StandardScaler()), ("logistic", LogisticRegression(C=c, max_iter=MAX_ITERATIONS))]
    model = Pipeline(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # recorded in the result instead
        return model.fit(x, y)
