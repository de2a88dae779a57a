"""The protocols by name."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastssl.evaluation.accuracy import judge
from fastssl.evaluation.config import EvalConfig, ProtocolName
from fastssl.evaluation.cost import (
    Sizes,
    few_label_s,
    finetune_s,
    knn_s,
    linear_augmented_s,
    linear_s,
    logistic_s,
)
from fastssl.evaluation.few_label import check_few_label, few_label, few_label_names
from fastssl.evaluation.finetune import finetune
from fastssl.evaluation.knn import check_knn, knn
from fastssl.evaluation.linear import linear
from fastssl.evaluation.linear_augmented import linear_augmented
from fastssl.evaluation.logistic import logistic
from fastssl.evaluation.task import Outcome, Task, split_validation


def check_choice(_: EvalConfig, train_y: np.ndarray) -> None:
    """Raise a ValueError if no validation part can be held out of the training part."""
    split_validation(train_y)


@dataclass(frozen=True)
class Protocol:
    """How one kind of evaluation runs.

    Attributes:
        run: Task -> outcomes by name.
        cost_s: (eval section, sizes) -> estimated seconds, without the features'.
        check: (eval section, training labels) -> raises ValueError if the protocol cannot run, to fail early.
        needs_images: Whether it encodes images itself and therefore cannot evaluate raw pixels.
        is_on_host: Whether it computes on the CPU where there is a GPU, too.
    """

    run: Callable[[Task], dict[str, Outcome]]
    cost_s: Callable[[EvalConfig, Sizes], float]
    check: Callable[[EvalConfig, np.ndarray], None]
    needs_images: bool = False
    is_on_host: bool = False


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "knn": Protocol(knn, knn_s, check_knn),
    "linear": Protocol(linear, linear_s, check_choice),
    "logistic": Protocol(logistic, logistic_s, check_choice, is_on_host=True),
    "few_label": Protocol(few_label, few_label_s, check_few_label, is_on_host=True),
    "linear_augmented": Protocol(linear_augmented, linear_augmented_s, check_choice, needs_images=True),
    "finetune": Protocol(finetune, finetune_s, check_choice, needs_images=True),
}


def outcome_names(cfg: EvalConfig) -> set[str]:
    """The names of all outcomes of eval.what."""
    names: set[str] = set()
    for name in cfg.what:
        names |= set(few_label_names(cfg)) if name == "few_label" else {name}
    return names


def evaluate(task: Task, test_y: np.ndarray, names: Iterable[ProtocolName]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Run protocols, and compare their predictions with the test labels only afterwards.

    Args:
        task: Contains no test labels.
        test_y: Labels int64 [M].
        names: Protocols; those that need images are skipped if the task has none.

    Yields:
        The outcome's name, and a JSON-serialisable dict: protocol, chosen, repeated_over, and the result of `judge`.

    Raises:
        ValueError: too few images for a protocol.
    """
    for name in names:
        protocol = PROTOCOLS[name]
        if protocol.needs_images and task.images is None:
            continue
        for outcome_name, outcome in protocol.run(task).items():
            yield (
                outcome_name,
                {"protocol": name, "chosen": outcome.chosen, "repeated_over": outcome.repeated_over}
                | judge(outcome.ranked, test_y, task.num_classes),
            )
