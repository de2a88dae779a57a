"""Weighted nearest-neighbour classification of frozen features."""

# N training images, M test images, F features, k neighbours, C classes

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.evaluation.config import EvalConfig, values_of
from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation

DEFAULT_K = 200  # Wu et al. 2018
_CHUNK_ROWS = 1024  # at ImageNet's 1.28 M training images one chunk of similarities takes 5.2 GB


def check_knn(cfg: EvalConfig, train_y: np.ndarray) -> None:
    """Refuse a choice for which nothing can be held out.

    Raises:
        ValueError: k or temperature is to be chosen, from too few images.
    """
    if _is_chosen(cfg):
        split_validation(train_y)


def bounded_k(cfg: EvalConfig, train_y: np.ndarray) -> tuple[int, ...]:
    """The numbers of neighbours that the training part allows, in [1, N], each once, in the configuration's order.

    Without eval.knn_k, k is DEFAULT_K, and at most the mean number of images per class: beyond it, most neighbours are
    of other classes even if the features are perfect. A configured k is bounded only by the number of images (of those
    that vote while k is chosen).

    Args:
        cfg: Its knn_k is used.
        train_y: Labels of the training part, int64 [N].
    """
    most = len(split_validation(train_y)[0]) if _is_chosen(cfg) else len(train_y)
    if cfg.knn_k is None:
        most = max(1, most // len(np.unique(train_y)))
    return tuple(dict.fromkeys(min(k, most) for k in _asked_for(cfg)))


def bounded_k_line(cfg: EvalConfig, train_y: np.ndarray) -> str | None:
    """A line that says by what k was bounded; None: it was not."""
    largest, asked = max(bounded_k(cfg, train_y)), max(_asked_for(cfg))
    if largest == asked:
        return None
    if cfg.knn_k is None:
        why = "a class has that many training images on average; eval.knn_k sets another k"
    else:
        why = "there are no more labelled training images to vote"
    return f"kNN: k = {largest:,} instead of {asked:,}: {why}"


def knn(task: Task) -> dict[str, Outcome]:
    """kNN with the configured k and temperature; if there are several, with the best pair on the validation part.

    Ties go to the first pair in the configuration's order. See `bounded_k` for a small training part.
    """
    cfg, chosen = task.cfg, {}
    pairs = list(itertools.product(bounded_k(cfg, task.train_y), values_of(cfg.knn_temperature)))
    fit, validation = split_validation(task.train_y) if _is_chosen(cfg) else (np.arange(0), np.arange(0))
    with task.progress("knn", len(validation) + len(task.test_x)) as progress:
        settings: dict[str, Any] = {"num_classes": task.num_classes, "device": task.device, "advance": progress.advance}
        if _is_chosen(cfg):
            votes = knn_votes(task.train_x[fit], task.train_y[fit], task.train_x[validation], pairs, **settings)
            top1 = [float((vote.argmax(1) == task.train_y[validation]).mean()) for vote in votes]
            chosen["validation_top1"] = max(top1)
            pairs = [pairs[top1.index(max(top1))]]
        votes = knn_votes(task.train_x, task.train_y, task.test_x, pairs, **settings)
    chosen = {"k": pairs[0][0], "temperature": pairs[0][1]} | chosen
    if pairs[0][0] not in _asked_for(cfg):
        chosen["k_asked_for"] = max(_asked_for(cfg))
    return {"knn": Outcome(ranked=[rank_classes(votes[0])], chosen=chosen)}


def knn_votes(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    pairs: list[tuple[int, float]],
    *,
    num_classes: int,
    device: torch.device | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Votes of the k most similar training images, each with weight exp((cosine - 1) / temperature).

    Wu et al. 2018, arXiv:1805.01978, section 3.4; k = 200 and temperature .1 as in their code for CIFAR-10. The -1
    scales all votes for an image by the same factor and keeps the weights in (0, 1].

    Args:
        train_x: Features [N, F]; normalised inside.
        train_y: Labels int64 [N] in [0, num_classes).
        test_x: Features [M, F].
        pairs: Pairs (k in [1, N], temperature > 0, dimensionless).
        num_classes: C.
        device: Device on which similarities and votes are computed, in fp32; None: the CPU.
        advance: Called with the number of test images of each chunk that is done.

    Returns:
        The votes for each pair, float32 [M, C].

    Raises:
        ValueError: k outside of [1, N], or temperature <= 0.
    """
    for k, temperature in pairs:
        if not 1 <= k <= len(train_x):
            raise ValueError(f"eval.knn_k must be in [1, {len(train_x)}], the number of training images, not {k}")
        if temperature <= 0:
            raise ValueError(f"eval.knn_temperature must be > 0, not {temperature}")
    train, labels = _unit_rows(train_x, device), torch.as_tensor(train_y, device=device)
    most = max(k for k, _ in pairs)
    votes: list[list[Tensor]] = [[] for _ in pairs]
    for chunk in _unit_rows(test_x, device).split(_CHUNK_ROWS):
        similarity, neighbours = (chunk @ train.T).topk(most)
        for found, (k, temperature) in zip(votes, pairs, strict=True):
            weights = ((similarity[:, :k] - 1) / temperature).exp()
            found.append(weights.new_zeros(len(chunk), num_classes).scatter_add_(1, labels[neighbours[:, :k]], weights))
        if advance:
            advance(len(chunk))
    return [torch.cat(found).cpu().numpy() for found in votes]


def _asked_for(cfg: EvalConfig) -> Sequence[int]:
    return (DEFAULT_K,) if cfg.knn_k is None else values_of(cfg.knn_k)


def _is_chosen(cfg: EvalConfig) -> bool:
    return len(values_of(cfg.knn_k)) * len(values_of(cfg.knn_temperature)) > 1


def _unit_rows(x: np.ndarray, device: torch.device | None) -> Tensor:
    return normalize(torch.as_tensor(x, dtype=torch.float32, device=device))
