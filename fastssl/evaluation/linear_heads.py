"""Linear classifiers trained in parallel on the same batches, so that a sweep costs little more than one classifier."""

# K classifiers, B batch size, N images, F features, C classes, E epochs

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation
from fastssl.optim.schedules import learning_rate

MOMENTUM = 0.9
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True, order=True)
class Candidate:
    """One setting of the sweep."""

    lr: float
    weight_decay: float


# (training positions, seed, epoch) -> number of batches, and the batches: features [B, F], positions [B]
Batches = Callable[[np.ndarray, int, int], tuple[int, Iterable[tuple[Tensor, np.ndarray]]]]


class LinearHeads:
    """K softmax classifiers, each with its own learning rate and weight decay.

    Plain SGD with momentum on the mean cross-entropy, in closed form: with p = softmax(x W + b) and the one-hot labels
    t the gradients are x^T (p - t) / B and the column means of p - t. The K weight matrices are columns of one matrix
    [F, K C], so each batch takes two matrix products, independently of K. Weights start at zero; biases have no weight
    decay.
    """

    def __init__(
        self, num_features: int, num_classes: int, candidates: Sequence[Candidate], device: torch.device
    ) -> None:
        self._num = len(candidates)
        self._num_classes = num_classes
        self.weight = torch.zeros(num_features, self._num * num_classes, device=device)
        self.bias = torch.zeros(self._num * num_classes, device=device)
        self._weight_velocity, self._bias_velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._lr = self._columns([candidate.lr for candidate in candidates])
        self._weight_decay = self._columns([candidate.weight_decay for candidate in candidates])

    def step(self, x: Tensor, y: Tensor, lr_factor: float) -> None:
        """Take one SGD step on a batch.

        Args:
            x: Standardised features, fp32 [B, F].
            y: Labels int64 [B].
            lr_factor: Factor on the peak learning rates.
        """
        error = self.scores(x).softmax(2)
        error.scatter_add_(2, y[:, None, None].expand(-1, self._num, 1), error.new_full((len(y), self._num, 1), -1.0))
        error = error.reshape(len(y), -1) / len(y)
        self._weight_velocity.mul_(MOMENTUM).addmm_(x.T, error).addcmul_(self.weight, self._weight_decay)
        self._bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
        self.weight.addcmul_(self._weight_velocity, self._lr, value=-lr_factor)
        self.bias.addcmul_(self._bias_velocity, self._lr, value=-lr_factor)

    def scores(self, x: Tensor) -> Tensor:
        """Logits [B, K, C]."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), self._num, self._num_classes)

    def _columns(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.weight.device).repeat_interleave(self._num_classes)


class Standardiser:
    """Centres columns and divides them by their standard deviation; constant columns are only centred."""

    def __init__(self, x: np.ndarray, positions: np.ndarray, device: torch.device) -> None:
        """Compute statistics of the rows of x [N, F] at `positions`, in fp64 and in chunks; stored on `device`."""
        pieces = np.array_split(positions, -(-len(positions) // _CHUNK_ROWS))
        mean = np.sum([x[piece].sum(0, dtype=np.float64) for piece in pieces], axis=0) / len(positions)
        squares = np.sum([((x[piece] - mean) ** 2).sum(0) for piece in pieces], axis=0)
        scale = np.sqrt(squares / len(positions))
        scale[scale <= 1e-6 * scale.max()] = 1.0
        self._mean, self._scale = (torch.tensor(column, dtype=torch.float32, device=device) for column in (mean, scale))

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise x [B, F], on any device; returns fp32 [B, F] on `device`."""
        return (x.to(self._mean) - self._mean) / self._scale


def sweep(task: Task, batches: Batches, num_epochs: int) -> Outcome:
    """Choose learning rate, weight decay and epoch on the validation part, then retrain on the whole training part.

    Validation and test images are scored with the features of their plain views. Ties go to the later epoch, the
    stronger weight decay and the smaller learning rate. The schedule is a cosine over `num_epochs`, even if training
    stops at an earlier epoch.

    Args:
        task: Features and labels.
        batches: Provides the training features.
        num_epochs: E.
    """
    cfg = task.cfg
    candidates = [Candidate(lr=lr, weight_decay=decay) for lr in cfg.linear_lrs for decay in cfg.linear_weight_decays]
    best, epoch, validation_top1 = _choose(task, batches, candidates, num_epochs)
    chosen: dict[str, Any] = {"lr": best.lr, "weight_decay": best.weight_decay, "epoch": epoch + 1}
    chosen |= {"num_epochs": num_epochs, "validation_top1": validation_top1}
    chosen["at_edge_of_grid"] = _at_edge(best, candidates)

    ranked = []
    for seed in range(cfg.num_seeds):
        learning = _learn(task, batches, np.arange(len(task.train_y)), [best], seed=seed, num_epochs=num_epochs)
        scores_of = next(itertools.islice(learning, epoch, None))
        ranked.append(np.concatenate([rank_classes(s[:, 0].cpu().numpy()) for s in scores_of(task.test_x)]))
    return Outcome(ranked=ranked, chosen=chosen, repeated_over="seeds")


Scores = Callable[[np.ndarray], Iterator[Tensor]]  # features [N, F] -> chunks of the logits [B, K, C]


def _learn(
    task: Task, batches: Batches, positions: np.ndarray, candidates: Sequence[Candidate], *, seed: int, num_epochs: int
) -> Iterator[Scores]:
    """Yield, after each epoch, a function that scores features."""
    standardise = Standardiser(task.train_x, positions, task.device)
    heads = LinearHeads(task.train_x.shape[1], task.num_classes, candidates, task.device)
    labels = torch.from_numpy(task.train_y).to(task.device)

    def scores_of(x: np.ndarray) -> Iterator[Tensor]:
        for first in range(0, len(x), _CHUNK_ROWS):
            yield heads.scores(standardise(torch.from_numpy(x[first : first + _CHUNK_ROWS])))

    for epoch in range(num_epochs):
        num_batches, found = batches(positions, seed, epoch)
        for number, (x, rows) in enumerate(found):
            factor = cosine(epoch * num_batches + number, num_epochs * num_batches)
            heads.step(standardise(x), labels[torch.from_numpy(rows).to(task.device)], factor)
        yield scores_of


def _choose(
    task: Task, batches: Batches, candidates: Sequence[Candidate], num_epochs: int
) -> tuple[Candidate, int, float]:
    """The best candidate on the validation part, its best epoch (0-based), and its accuracy there."""
    fit, validation = split_validation(task.train_y)
    top1 = np.empty((num_epochs, len(candidates)))
    for epoch, scores_of in enumerate(_learn(task, batches, fit, candidates, seed=0, num_epochs=num_epochs)):
        top1[epoch] = _top1(scores_of, task.train_x[validation], task.train_y[validation])
    epoch, index = max(
        np.ndindex(*top1.shape), key=lambda at: (top1[at], at[0], candidates[at[1]].weight_decay, -candidates[at[1]].lr)
    )
    return candidates[index], epoch, float(top1[epoch, index])


def cosine(step: int, num_steps: int) -> float:
    """Cosine schedule as a fraction of the peak learning rate: 1 at step 0, 0 after the last step."""
    return learning_rate(step, base_lr=1.0, global_batch_size=256, warmup_steps=0, total_steps=num_steps)


def _top1(scores_of: Scores, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Top-1 accuracy of each classifier [K]; 0 for a classifier that has diverged."""
    hits, first = 0, 0
    for scores in scores_of(x):
        best, predicted = scores.cpu().max(2)
        labels = torch.from_numpy(y[first : first + len(scores)])[:, None]
        hits = hits + ((predicted == labels) & best.isfinite()).sum(0)
        first += len(scores)
    return np.asarray(hits) / len(y)


def _at_edge(best: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Settings whose best value is the first or last of the grid: a wider grid might be better."""
    edges = []
    for name in ("lr", "weight_decay"):
        values = sorted({getattr(candidate, name) for candidate in candidates})
        value = getattr(best, name)
        if len(values) > 1 and (value == values[-1] or (value == values[0] and value > 0)):
            edges.append(name)
    return edges
