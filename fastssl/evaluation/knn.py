"""Weighted nearest-neighbour classification of frozen features."""

# N training images, M test images, F features, k neighbours, C classes

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK_ROWS = 1024  # at ImageNet's 1.28 M training images one chunk of similarities takes 5.2 GB


def knn_predict(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
) -> np.ndarray:
    """Classify by a vote of the k most similar training images, each weighing exp(cosine / temperature).

    Wu et al. 2018, arXiv:1805.01978, section 3.4; k = 200 and temperature .1 as in their code for CIFAR-10.

    Args:
        train_x: Features [N, F]; normalised inside.
        train_y: Labels int64 [N] in [0, num_classes).
        test_x: Features [M, F].
        k: Neighbours, in [1, N].
        temperature: > 0, dimensionless.
        num_classes: C.

    Returns:
        Classes int64 [M]; the lowest one where votes are equal.

    Raises:
        ValueError: k outside of [1, N], or temperature <= 0.
    """
    if not 1 <= k <= len(train_x):
        raise ValueError(f"eval.knn_k must be in [1, {len(train_x)}], the number of training images, not {k}")
    if temperature <= 0:
        raise ValueError(f"eval.knn_temperature must be > 0, not {temperature}")
    train, labels = _unit_rows(train_x), torch.as_tensor(train_y)
    votes = [
        _vote(chunk, train, labels, k=k, temperature=temperature, num_classes=num_classes)
        for chunk in _unit_rows(test_x).split(_CHUNK_ROWS)
    ]
    return torch.cat(votes).argmax(1).numpy()


def _unit_rows(x: np.ndarray) -> Tensor:
    return normalize(torch.as_tensor(x, dtype=torch.float32))


def _vote(test: Tensor, train: Tensor, labels: Tensor, *, k: int, temperature: float, num_classes: int) -> Tensor:
    similarity, neighbours = (test @ train.T).topk(k)
    weights = ((similarity - 1) / temperature).exp()  # the -1 scales all votes alike and keeps exp in (0, 1]
    return torch.zeros(len(test), num_classes).scatter_add_(1, labels[neighbours], weights)
