"""What protocols cost in seconds, estimated from sizes alone, so that two evaluations of one run decide alike.

The constants are cautious rates of one core with AVX2. An estimate may be wrong by a factor of two; it decides what is
evaluated by default and how settings are searched, so it must not depend on a clock.
"""

# N training images, M test images, F features, C classes, K classifiers

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastssl.evaluation.config import EvalConfig, ProtocolName, values_of
from fastssl.evaluation.linear_heads import FULL, HALVING, WIDENED, Search, round_lengths

if TYPE_CHECKING:
    from fastssl.evaluation.task import Task

LEAST_LIMIT_S = 20.0  # an evaluation of this length is never cut
WHOLE_SEARCH_S = 5.0  # on one core, or on a GPU: a search of this length is not shortened
_CORE_FLOP_PER_S = 20e9  # fp32 matrix products
_GPU_FLOP_PER_S = 5e12
_SORT_S = 3e-9  # per similarity, to find the nearest neighbours
_LOGIT_S = 10e-9  # per logit and step: softmax and its gradient
_WEIGHT_S = 3e-9  # per weight and step: velocity, decay and update
ITERATIONS = 300  # of L-BFGS, which a fit takes on average
NUM_PENALTIES = 5  # that `logistic` compares
PATH_ITERATIONS = 100  # of L-BFGS at most, to compare penalties


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a cost depends on.

    Attributes:
        num_train: N.
        num_test: M.
        num_features: F.
        num_classes: C.
        image_s: Seconds to encode an image.
        num_cores: Cores of the device; 0: a GPU.
    """

    num_train: int
    num_test: int
    num_features: int
    num_classes: int
    image_s: float = 0.0
    num_cores: int = 1

    @classmethod
    def of_task(cls, task: Task) -> Sizes:
        """The sizes of a task on one core of its device, however many there are, or on a GPU."""
        return cls(
            num_train=len(task.train_y),
            num_test=len(task.test_x),
            num_features=task.train_x.shape[1],
            num_classes=task.num_classes,
            num_cores=int(task.device.type == "cpu"),
        )

    def work_s(self, flop: float, elements_s: float) -> float:
        """Seconds of matrix products, and of work on elements that takes one core `elements_s`."""
        if not self.num_cores:
            return flop / _GPU_FLOP_PER_S + elements_s * _CORE_FLOP_PER_S / _GPU_FLOP_PER_S
        return (flop / _CORE_FLOP_PER_S + elements_s) / self.num_cores


def knn_s(cfg: EvalConfig, sizes: Sizes) -> float:
    """Seconds of `knn`."""
    num_scored = sizes.num_test + (sizes.num_train / 10 if len(values_of(cfg.knn_k)) > 1 else 0)
    pairs = num_scored * sizes.num_train
    return sizes.work_s(2.0 * pairs * sizes.num_features, _SORT_S * pairs)


def linear_search(cfg: EvalConfig, sizes: Sizes) -> Search:
    """How `linear` searches; "auto" depends on the time that all settings would take on one core, or on a GPU."""
    if cfg.search == "auto":
        return WIDENED if _heads_s(cfg, sizes, WIDENED, cfg.linear_epochs) <= WHOLE_SEARCH_S else HALVING
    return FULL if cfg.search == "full" else HALVING


def linear_s(cfg: EvalConfig, sizes: Sizes) -> float:
    """Seconds of `linear`."""
    search = linear_search(cfg, replace(sizes, num_cores=min(1, sizes.num_cores)))
    return _heads_s(cfg, sizes, search, cfg.linear_epochs)


def linear_augmented_s(cfg: EvalConfig, sizes: Sizes) -> float:
    """Seconds of `linear_augmented`."""
    num_encoded = (1 + cfg.num_seeds) * cfg.augmented_epochs * sizes.num_train
    return num_encoded * sizes.image_s + _heads_s(cfg, sizes, FULL, cfg.augmented_epochs)


def finetune_s(cfg: EvalConfig, sizes: Sizes) -> float:
    """Seconds of `finetune`; a step takes the time of three encodings."""
    num_epochs = (len(cfg.finetune_lrs) + cfg.num_seeds) * cfg.finetune_epochs
    return (3 * num_epochs * sizes.num_train + cfg.num_seeds * sizes.num_test) * sizes.image_s


def is_path(cfg: EvalConfig, sizes: Sizes) -> bool:
    """Whether `logistic` compares penalties along a path instead of fitting each of the grid to the end."""
    all_s = NUM_PENALTIES * ITERATIONS * iteration_s(sizes)
    return cfg.search == "halving" or (cfg.search == "auto" and all_s > WHOLE_SEARCH_S)


def logistic_s(cfg: EvalConfig, sizes: Sizes) -> float:
    """Seconds of `logistic`, which runs on one core."""
    each = PATH_ITERATIONS if is_path(cfg, sizes) else ITERATIONS
    return (NUM_PENALTIES * each + ITERATIONS) * iteration_s(sizes)


def iteration_s(sizes: Sizes) -> float:
    """Seconds of an iteration of L-BFGS over the whole training part on one core."""
    logits = sizes.num_train * sizes.num_classes
    return 4.0 * logits * sizes.num_features / _CORE_FLOP_PER_S + _LOGIT_S * logits


def few_label_s(cfg: EvalConfig, sizes: Sizes) -> float:
    """Seconds of `few_label`."""
    total_s = 0.0
    for num_per_class in cfg.few_labels:
        num_labelled = num_per_class * sizes.num_classes
        drawn = replace(sizes, num_train=num_labelled)
        nearest_s = (2.0 * sizes.num_features / _CORE_FLOP_PER_S + _SORT_S) * num_labelled * sizes.num_test
        total_s += cfg.num_draws * (ITERATIONS * iteration_s(drawn) + nearest_s)
    return total_s


def _heads_s(cfg: EvalConfig, sizes: Sizes, search: Search, num_epochs: int) -> float:
    """Seconds of a sweep without encoding, with one widening where there may be any."""
    num_candidates = len(cfg.linear_lrs) * len(cfg.linear_weight_decays)
    rounds = round_lengths(num_candidates, num_epochs, search)
    trained = sum(epochs * num for epochs, num, _ in rounds) + 3 * num_epochs * min(1, search.max_widenings)
    passes = (trained + cfg.num_seeds * num_epochs) * sizes.num_train  # images seen by a classifier
    weights = sizes.num_features * sizes.num_classes
    num_updates = passes / min(cfg.sgd_batch_size, sizes.num_train)
    elements_s = _LOGIT_S * passes * sizes.num_classes + _WEIGHT_S * num_updates * weights
    return sizes.work_s(4.0 * passes * weights, elements_s)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One encoder by one protocol.

    Attributes:
        encoder: Its name in the results.
        protocol: Name of the protocol.
        cost_s: Seconds that it is expected to take.
        encode_s: Seconds to compute the features, which the encoder's protocols share.
        is_asked_for: Whether it runs whatever it takes.
    """

    encoder: str
    protocol: ProtocolName
    cost_s: float
    encode_s: float
    is_asked_for: bool


def within(jobs: Sequence[Job], limit_s: float | None) -> tuple[list[Job], list[Job], float]:
    """Choose the jobs that fit into a time, in the order of their importance; the first one is always among them.

    A job of infinite cost runs only if it was asked for.

    Args:
        jobs: The most important one first.
        limit_s: None: no limit.

    Returns:
        The jobs that run, those that are left out, and the seconds that are expected.
    """
    kept: list[Job] = []
    left_out: list[Job] = []
    limit_s, total_s = math.inf if limit_s is None else limit_s, 0.0
    for job in jobs:
        is_encoded = job.encoder in {other.encoder for other in kept}
        cost_s = job.cost_s + (0.0 if is_encoded else job.encode_s)
        if job.is_asked_for or (math.isfinite(cost_s) and (not kept or total_s + cost_s <= limit_s)):
            kept.append(job)
            total_s += cost_s
        else:
            left_out.append(job)
    return kept, left_out, total_s
