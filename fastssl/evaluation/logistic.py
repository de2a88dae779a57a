"""Logistic regression on frozen features: the linear evaluation without a schedule to tune."""

# N training images, F features, C classes

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation

C_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse strength of the L2 penalty; the loss is a sum over images
MAX_ITERATIONS = 1000


def logistic(task: Task) -> dict[str, Outcome]:
    """Choose C on the validation part, fit the whole training part, and score the test part once."""
    # L-BFGS makes thousands of small BLAS calls, for which a second thread only adds waiting (30 times slower next to
    # another busy process on 2 cores); with one thread the result does not depend on the number of cores.
    with threadpool_limits(1, user_api="blas"):
        c, validation_top1 = choose_c(task.train_x, task.train_y)
        model = fit_logistic(task.train_x, task.train_y, c)
        ranked = rank_classes(class_scores(model, task.test_x, task.num_classes))
    converged = int(model.named_steps["logistic"].n_iter_.max()) < MAX_ITERATIONS
    chosen = {"c": c, "validation_top1": validation_top1, "converged": converged}
    return {"logistic": Outcome(ranked=[ranked], chosen=chosen)}


def choose_c(train_x: np.ndarray, train_y: np.ndarray) -> tuple[float, float]:
    """The C of C_GRID with the best accuracy on the validation part, and that accuracy.

    Ties go to the smallest C, the strongest penalty.
    """
    fit, validation = split_validation(train_y)

    def validation_top1(c: float) -> float:
        return float(fit_logistic(train_x[fit], train_y[fit], c).score(train_x[validation], train_y[validation]))

    top1 = [validation_top1(c) for c in C_GRID]
    return C_GRID[top1.index(max(top1))], max(top1)


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
