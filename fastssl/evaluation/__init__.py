"""How good features are: weighted kNN, logistic regression, a few labels per class."""

# N training images, M test images, F features

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastssl.evaluation.config import EvalConfig

if TYPE_CHECKING:
    import numpy as np

Result = dict[str, Any]


def evaluate_arrays(
    train_x: "np.ndarray", train_y: "np.ndarray", test_x: "np.ndarray", test_y: "np.ndarray", cfg: EvalConfig
) -> Result:
    """Judge features, or raw pixels, by every protocol of the configuration.

    Args:
        train_x: [N, ...], flattened to [N, F] float32.
        train_y: Labels int64 [N], >= 0.
        test_x: [M, ...], as train_x.
        test_y: Labels int64 [M].

    Returns:
        "knn": top1, k, temperature; "logistic": top1, c, converged; "few_label": for each number of labels per
        class the mean and standard deviation of logistic regression and of the nearest neighbour. All
        accuracies are fractions. JSON-ready.

    Raises:
        ValueError: an image without a label, or too few images for a protocol.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    from fastssl.evaluation.few_label import evaluate_few_labels
    from fastssl.evaluation.knn import knn_predict
    from fastssl.evaluation.logistic import evaluate_logistic

    if min(train_y.min(), test_y.min()) < 0:
        raise ValueError("evaluation needs a label for every image")
    train_x = train_x.reshape(len(train_x), -1).astype(np.float32, copy=False)
    test_x = test_x.reshape(len(test_x), -1).astype(np.float32, copy=False)
    k, temperature = min(cfg.knn_k, len(train_x)), cfg.knn_temperature
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    predicted = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=num_classes)
    # L-BFGS makes thousands of small BLAS calls: a second thread only waits (30 times slower beside another busy
    # process, 2 cores), and with one the result does not depend on the number of cores.
    with threadpool_limits(1, user_api="blas"):
        logistic = asdict(evaluate_logistic(train_x, train_y, test_x, test_y))
        few_label = {
            str(n): asdict(
                evaluate_few_labels(train_x, train_y, test_x, test_y, num_per_class=n, num_draws=cfg.num_draws)
            )
            for n in cfg.few_labels
        }
    top1 = float((predicted == test_y).mean())
    return {"knn": {"top1": top1, "k": k, "temperature": temperature}, "logistic": logistic, "few_label": few_label}


def format_table(results: Mapping[str, Result]) -> str:
    """A plain-text table of top-1 accuracies in per cent, one row for each entry.

    Args:
        results: Row name, such as "raw pixels" or "pre-trained encoder", -> what `evaluate_arrays` returned.
    """
    rows = [_cells(name, result) for name, result in results.items()]
    header = list(rows[0])
    table = [header, *([row[column] for column in header] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = [_align(line, widths) for line in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _align(line: list[str], widths: list[int]) -> str:
    name, *numbers = line
    return "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(numbers, widths[1:], strict=True))])


def _cells(name: str, result: Result) -> dict[str, str]:
    cells = {"top-1 in %": name}
    cells[f"kNN (k={result['knn']['k']})"] = _percent(result["knn"]["top1"])
    cells["logistic"] = _percent(result["logistic"]["top1"])
    for num_labels, few in result["few_label"].items():
        for title, key in (("logistic", "logistic"), ("1-NN", "nearest")):
            mean, sd = few[f"{key}_mean"], few[f"{key}_sd"]
            cells[f"{title}, {num_labels}/class"] = f"{_percent(mean)} ± {_percent(sd)}"
    return cells


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
