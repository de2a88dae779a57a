"""Linear classifiers trained in parallel on the same batches, so that a sweep costs little more than one classifier."""

# K classifiers, B batch size, N images, F features, C classes, E epochs

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluation.task import Outcome, Task, rank_classes, split_validation
from fastssl.optim.schedules import learning_rate
from pipelines.progress import Progress

MOMENTUM = 0.9
ROUNDS = ((0.08, 16), (0.32, 6))  # see `Search`
_CHUNK_ROWS = 4096
_LIMITS = {"lr": (1e-12, 1e12), "weight_decay": (1e-12, 100.0)}  # of values beyond the grid
_MAX_FACTOR = 10.0


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

    Attributes:
        num: K.
    """

    def __init__(
        self, num_features: int, num_classes: int, candidates: Sequence[Candidate], device: torch.device
    ) -> None:
        self.num = len(candidates)
        self._num_classes = num_classes
        self.weight = torch.zeros(num_features, self.num * num_classes, device=device)
        self.bias = torch.zeros(self.num * num_classes, device=device)
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
        error.scatter_add_(2, y[:, None, None].expand(-1, self.num, 1), error.new_full((len(y), self.num, 1), -1.0))
        error = error.reshape(len(y), -1) / len(y)
        self._weight_velocity.mul_(MOMENTUM).addmm_(x.T, error).addcmul_(self.weight, self._weight_decay)
        self._bias_velocity.mul_(MOMENTUM).add_(error.sum(0))
        self.weight.addcmul_(self._weight_velocity, self._lr, value=-lr_factor)
        self.bias.addcmul_(self._bias_velocity, self._lr, value=-lr_factor)

    def scores(self, x: Tensor) -> Tensor:
        """Logits [B, K, C]."""
        return torch.addmm(self.bias, x, self.weight).view(len(x), self.num, self._num_classes)

    def keep(self, which: Sequence[int]) -> None:
        """Go on with these of the K classifiers only, in this order."""
        each = torch.tensor(which, device=self.bias.device)[:, None] * self._num_classes
        columns = (each + torch.arange(self._num_classes, device=self.bias.device)).flatten()
        self.weight, self._weight_velocity = self.weight[:, columns], self._weight_velocity[:, columns]
        self.bias, self._bias_velocity = self.bias[columns], self._bias_velocity[columns]
        self._lr, self._weight_decay = self._lr[columns], self._weight_decay[columns]
        self.num = len(which)

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


@dataclass(frozen=True, kw_only=True)
class Found:
    """A candidate's best epoch on the validation part; the larger is the better one, see `sweep` for equal ones.

    Attributes:
        top1: Accuracy there.
        epoch: The epoch, 0-based.
        candidate: The settings.
    """

    top1: float
    epoch: int
    candidate: Candidate

    def __lt__(self, other: "Found") -> bool:
        return self.order() < other.order()

    def order(self) -> tuple[float, int, float, float]:
        return self.top1, self.epoch, self.candidate.weight_decay, -self.candidate.lr


@dataclass(frozen=True, kw_only=True)
class Search:
    """How `sweep` looks for the best candidate.

    Attributes:
        rounds: Pairs (share of the epochs, number of candidates that stay): after this part of the training only the
            candidates that have been the best until then go on (successive halving, Jamieson and Talwalkar 2016,
            arXiv:1502.07943). A round that drops nobody is left out.
        max_widenings: How often the grid grows by a value where the best one is its first or last. A value beyond the
            grid must be better, not equal.
    """

    rounds: tuple[tuple[float, int], ...] = ()
    max_widenings: int = 0


FULL = Search()
WIDENED = Search(max_widenings=2)
HALVING = Search(rounds=ROUNDS, max_widenings=2)


def sweep(task: Task, batches: Batches, num_epochs: int, *, name: str, search: Search = FULL) -> Outcome:
    """Choose learning rate, weight decay and epoch on the validation part, then retrain on the whole training part.

    Validation and test images are scored with the features of their plain views. Ties go to the later epoch, the
    stronger weight decay and the smaller learning rate. The schedule is a cosine over `num_epochs`, even if training
    stops at an earlier epoch.

    Args:
        task: Features and labels.
        batches: Provides the training features.
        num_epochs: E.
        name: The protocol's.
        search: Which candidates are trained for how long.
    """
    cfg, num_images = task.cfg, len(task.train_y)
    grid = [Candidate(lr=lr, weight_decay=decay) for lr in cfg.linear_lrs for decay in cfg.linear_weight_decays]
    with task.progress(name, cfg.num_seeds * num_epochs * num_images) as progress:
        best, edges = _choose(task, batches, grid, num_epochs, search, progress)
        chosen: dict[str, Any] = {"lr": best.candidate.lr, "weight_decay": best.candidate.weight_decay}
        chosen |= {"epoch": best.epoch + 1, "num_epochs": num_epochs, "validation_top1": best.top1}
        chosen["at_edge_of_grid"] = edges
        progress.extend(-cfg.num_seeds * (num_epochs - best.epoch - 1) * num_images)

        ranked = []
        for seed in range(cfg.num_seeds):
            everything = np.arange(num_images)
            learning = _learn(
                task, batches, everything, [best.candidate], seed=seed, num_epochs=num_epochs, progress=progress
            )
            scores_of, _ = next(itertools.islice(learning, best.epoch, None))
            ranked.append(np.concatenate([rank_classes(s[:, 0].cpu().numpy()) for s in scores_of(task.test_x)]))
    return Outcome(ranked=ranked, chosen=chosen, repeated_over="seeds")


Scores = Callable[[np.ndarray], Iterator[Tensor]]  # features [N, F] -> chunks of the logits [B, K, C]
Keep = Callable[[Sequence[int]], None]  # as `LinearHeads.keep`


def _learn(
    task: Task,
    batches: Batches,
    positions: np.ndarray,
    candidates: Sequence[Candidate],
    *,
    seed: int,
    num_epochs: int,
    progress: Progress,
) -> Iterator[tuple[Scores, Keep]]:
    """Yield, after each epoch, a function that scores features, and one that drops classifiers."""
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
            progress.advance(len(rows) * heads.num)
        yield scores_of, heads.keep


def _choose(
    task: Task, batches: Batches, grid: Sequence[Candidate], num_epochs: int, search: Search, progress: Progress
) -> tuple[Found, list[str]]:
    """The best candidate on the validation part, and the settings whose best value is at an edge of the grid."""
    fit, validation = split_validation(task.train_y)
    validation_x, validation_y = task.train_x[validation], task.train_y[validation]

    def trained(candidates: Sequence[Candidate], rounds: Sequence[tuple[int, int, int]]) -> Found:
        """The best of the candidates, of which fewer and fewer are trained."""
        best_of: dict[Candidate, Found] = {}
        ends = itertools.accumulate(epochs for epochs, _, _ in rounds)
        num_kept_after = {end: num_kept for end, (_, _, num_kept) in zip(ends, rounds, strict=True) if end < num_epochs}
        progress.extend(len(fit) * sum(epochs * num for epochs, num, _ in rounds))
        kept = list(candidates)
        learning = _learn(task, batches, fit, candidates, seed=0, num_epochs=num_epochs, progress=progress)
        for epoch, (scores_of, keep) in enumerate(learning):
            top1 = _top1(scores_of, validation_x, validation_y)
            for candidate, value in zip(kept, top1, strict=True):
                found = Found(top1=float(value), epoch=epoch, candidate=candidate)
                best_of[candidate] = max(best_of.get(candidate, found), found)
            if num_kept := num_kept_after.get(epoch + 1):
                best_first = sorted(((best_of[each], at) for at, each in enumerate(kept)), reverse=True)
                order = [at for _, at in best_first[:num_kept]]
                keep(order)
                kept = [kept[at] for at in order]
        return max(best_of.values())

    best = trained(grid, round_lengths(len(grid), num_epochs, search))
    values = {name: sorted({getattr(each, name) for each in grid}) for name in _LIMITS}
    for _ in range(search.max_widenings):
        beyond = {name: value for name in _LIMITS if (value := next_beyond(values[name], best.candidate, name))}
        if not beyond:
            break
        more = [replace(best.candidate, **{name: value}) for name, value in beyond.items()]
        more += [replace(best.candidate, **beyond)] * (len(beyond) > 1)
        for name, value in beyond.items():
            values[name] = sorted([*values[name], value])
        found = trained(more, [(num_epochs, len(more), 1)])
        best = found if found.top1 > best.top1 else best
    return best, [name for name in _LIMITS if next_beyond(values[name], best.candidate, name)]


def round_lengths(num_candidates: int, num_epochs: int, search: Search) -> list[tuple[int, int, int]]:
    """The rounds of a search without its widenings, one after the other: epochs, candidates, how many of them stay."""
    lengths, done = [], 0
    for share, num_kept in search.rounds:
        end = max(done + 1, round(share * num_epochs))
        if num_kept < num_candidates and end < num_epochs:
            lengths.append((end - done, num_candidates, num_kept))
            num_candidates, done = num_kept, end
    return [*lengths, (num_epochs - done, num_candidates, 1)]


def next_beyond(values: Sequence[float], best: Candidate, name: str) -> float | None:
    """The value beyond the edge of the grid at which the best candidate lies.

    The step is that between the last two values, and at most a factor of 10.

    Args:
        values: The grid of one setting, ascending.
        best: The best candidate.
        name: The setting.

    Returns:
        None: the value is inside of the grid, 0, the only one (it was not to be chosen), or the last that is possible.
    """
    value = getattr(best, name)
    if len(values) < 2 or value == 0 or value not in (values[0], values[-1]):
        return None
    is_last = value == values[-1]
    low, high = values[-2:] if is_last else values[:2]
    factor = min(high / low, _MAX_FACTOR) if low else _MAX_FACTOR
    beyond = value * factor if is_last else value / factor
    least, most = _LIMITS[name]
    return beyond if least <= beyond <= most else None


def cosine(step: int, num_steps: int) -> float:
    """Cosine schedule as a fraction of the peak learning rate: 1 at step 0, 0 after the last step."""
    return learning_rate(step, base_lr=1.0, global_batch_size=256, warmup_steps=0, total_steps=num_steps)


def _top1(scores_of: Scores, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Top-1 accuracy of each classifier [K]; 0 for a classifier that has diverged."""
    hits, first = 0, 0
    for scores in scores_of(x):
        best, predicted = (found.cpu() for found in scores.max(2))  # all logits may be gigabytes, slow to copy
        labels = torch.from_numpy(y[first : first + len(scores)])[:, None]
        hits = hits + ((predicted == labels) & best.isfinite()).sum(0)
        first += len(scores)
    return np.asarray(hits) / len(y)
