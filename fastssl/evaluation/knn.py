"""Weighted nearest-neighbour classification of frozen features."""

# N training images, M test images, F features, k neighbours, C classes

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastssl.evaluation.config import EvalConfig, values_of
from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation

_CHUNK_ROWS = 1024  # at ImageNet's 1.28 M training images one chunk of similarities takes 5.2 GB


def check_knn(cfg: EvalConfig, train_y: np.ndarray) -> None:
    """Refuse more neighbours than there are training images.

    Raises:
        ValueError: names the key.
    """
    num_images = len(split_validation(train_y)[0]) if _is_chosen(cfg) else len(train_y)
    k = max(values_of(cfg.knn_k))
    if k > num_images:
        raise ValueError(f"eval.knn_k is {k}, but there are only {num_images} labelled training images: lower it")


def knn(task: Task) -> dict[str, Outcome]:
    """kNN with the configured k and temperature; if there are several, with the best pair on the validation part.

    Ties go to the first pair in the configuration's order.
    """
    cfg, chosen = task.cfg, {}
    settings: dict[str, Any] = {"num_classes": task.num_classes, "device": task.device}
    pairs = list(itertools.product(values_of(cfg.knn_k), values_of(cfg.knn_temperature)))
    if _is_chosen(cfg):
        fit, validation = split_validation(task.train_y)
        votes = knn_votes(task.train_x[fit], task.train_y[fit], task.train_x[validation], pairs, **settings)
        top1 = [float((vote.argmax(1) == task.train_y[validation]).mean()) for vote in votes]
        chosen["validation_top1"] = max(top1)
        pairs = [pairs[top1.index(max(top1))]]
    votes = knn_votes(task.train_x, task.train_y, task.test_x, pairs, **settings)
    chosen = {"k": pairs[0][0], "temperature": pairs[0][1]} | chosen
    return {"knn": Outcome(ranked=[rank_classes(votes[0])], chosen=chosen)}


def knn_votes(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    pairs: list[tuple[int, float]],
    *,
    num_classes: int,
    device: torch.device | None = None,
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
    return [torch.cat(found).cpu().numpy() for found in votes]


def _is_chosen(cfg: EvalConfig) -> bool:
    return len(values_of(cfg.knn_k)) * len(values_of(cfg.knn_temperature)) > 1


def _unit_rows(x: np.ndarray, device: torch.device | None) -> Tensor:
    return normalize(torch.as_tensor(x, dtype=torch.float32, device=device))
