"""The sweep: each of its classifiers is the one that learns alone, and nothing of the held-out part is learnt from."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.linear import linear
from fastssl.evaluation.linear_heads import (
    FULL,
    HALVING,
    WIDENED,
    Candidate,
    LinearHeads,
    Search,
    Standardiser,
    cosine,
    next_beyond,
    round_lengths,
    sweep,
)
from fastssl.evaluation.task import Task, split_validation

CPU = torch.device("cpu")


def _clusters(num: int, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 4
    centres = np.random.default_rng(99).normal(size=(4, 12))
    return (centres[labels] + spread * rng.normal(size=(num, 12))).astype(np.float32), labels.astype(np.int64)


def _task(**settings) -> Task:
    (train_x, train_y), (test_x, _) = _clusters(300), _clusters(80, seed=1)
    cfg = EvalConfig(**{"linear_epochs": 4, "sgd_batch_size": 64} | settings)
    return Task(cfg=cfg, train_x=train_x, train_y=train_y, test_x=test_x, num_classes=4)


def test_each_classifier_takes_the_steps_of_torchs_sgd():
    x, y = (torch.from_numpy(array) for array in _clusters(64))
    candidates = [Candidate(lr=0.1, weight_decay=0.0), Candidate(lr=0.5, weight_decay=0.01)]
    heads = LinearHeads(12, 4, candidates, CPU)
    for step in range(20):
        heads.step(x, y, cosine(step, 20))
    for index, candidate in enumerate(candidates):
        alone = nn.Linear(12, 4)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        decays = [{"params": [alone.weight], "weight_decay": candidate.weight_decay}, {"params": [alone.bias]}]
        optimizer = torch.optim.SGD(decays, lr=0.1, momentum=0.9)
        for step in range(20):
            for group in optimizer.param_groups:
                group["lr"] = candidate.lr * cosine(step, 20)
            optimizer.zero_grad()
            nn.functional.cross_entropy(alone(x), y).backward()
            optimizer.step()
        # torch's velocity has no learning rate in it either; fp32 rounding over 20 steps
        torch.testing.assert_close(heads.scores(x)[:, index], alone(x).detach(), rtol=1e-4, atol=1e-5)


def test_standardiser_reads_the_given_rows_only_and_leaves_constant_columns():
    x = np.random.default_rng(0).normal(3.0, 2.0, (50, 4)).astype(np.float32)
    x[:, 2] = 7.0
    rows = np.arange(0, 40)
    poisoned = x.copy()
    poisoned[40:] = 1e6
    found = Standardiser(poisoned, rows, CPU)(torch.from_numpy(x[rows])).numpy()
    np.testing.assert_allclose(found.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(found.std(0), [1, 1, 0, 1], atol=1e-5)


def test_settings_are_chosen_without_the_validation_part_and_all_is_learnt_from_then():
    task = _task(num_seeds=2)
    fit, validation = split_validation(task.train_y)
    seen: dict[tuple[int, int], list[int]] = {}

    def batches(positions, seed, epoch):
        key = (seed, len(positions))
        seen.setdefault(key, []).extend(positions.tolist())
        return 1, [(torch.from_numpy(task.train_x[positions]), positions)]

    outcome = sweep(task, batches, 3, name="linear")
    assert set(seen) == {(0, len(fit)), (0, 300), (1, 300)}
    assert not set(seen[0, len(fit)]) & set(validation.tolist())
    assert set(seen[1, 300]) == set(range(300))
    assert len(seen[0, 300]) == 300 * outcome.chosen["epoch"]  # it stops at the chosen epoch
    assert len(outcome.ranked) == 2


def test_the_sweep_finds_what_is_good_and_leaves_what_diverges():
    task = _with_common_noise(_task(linear_lrs=(1e-7, 0.3, 3e38), linear_weight_decays=(0.0,), linear_epochs=30))
    outcome = linear(task)["linear"]
    assert outcome.chosen["lr"] == 0.3
    assert outcome.chosen["at_edge_of_grid"] == []
    test_y = _clusters(80, seed=1)[1]
    assert (outcome.ranked[0][:, 0] == test_y).mean() > 0.6
    cfg = dataclasses.replace(task.cfg, linear_lrs=(1e-7, 0.3), search="full")
    edge = linear(dataclasses.replace(task, cfg=cfg))["linear"]
    assert edge.chosen["at_edge_of_grid"] == ["lr"]


def _with_common_noise(task: Task) -> Task:
    """The same noise in all columns of an image: the first step, towards the means of the classes, is a bad one."""
    rng = np.random.default_rng(5)
    train_x, test_x = (x + 20 * rng.normal(size=(len(x), 1)).astype(np.float32) for x in (task.train_x, task.test_x))
    return dataclasses.replace(task, train_x=train_x, test_x=test_x)


@pytest.mark.parametrize("search", [FULL, WIDENED, Search(rounds=((0.5, 2),), max_widenings=3)])
def test_of_equal_settings_the_last_epoch_strong_decay_and_small_rate_count(search):
    task = _task(linear_lrs=(0.2, 0.1), linear_weight_decays=(0.0, 1e-9))
    still = sweep(task, lambda positions, seed, epoch: (1, []), 3, name="linear", search=search)  # nobody learns
    assert still.chosen["epoch"] == 3
    assert (still.chosen["lr"], still.chosen["weight_decay"]) == (0.1, 1e-9)


def test_an_epoch_takes_every_image_once_in_batches_of_nearly_one_size(monkeypatch):
    taken = []
    real = LinearHeads.step
    monkeypatch.setattr(LinearHeads, "step", lambda self, x, y, f: taken.append(len(y)) or real(self, x, y, f))
    linear(_task(linear_epochs=1, sgd_batch_size=64, search="full"))
    assert taken == [54] * 5 + [60] * 5  # 270 to choose, 300 to learn from


@pytest.mark.parametrize(("labels", "message"), [([0, 1] * 4, "at least 10"), ([3] * 20, "at least two classes")])
def test_too_little_to_choose_on_is_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        split_validation(np.array(labels))


# --- the search


def test_the_grid_grows_where_the_best_value_is_its_last_and_the_new_one_is_better():
    task = _with_common_noise(_task(linear_lrs=(1e-4, 1e-2), linear_weight_decays=(0.0,), linear_epochs=30))
    full, widened = (linear(_with(task, search=name))["linear"].chosen for name in ("full", "auto"))
    assert (full["lr"], full["at_edge_of_grid"]) == (1e-2, ["lr"])
    assert widened["lr"] == pytest.approx(0.1)
    assert widened["validation_top1"] > full["validation_top1"]


def _with(task: Task, **settings) -> Task:
    return dataclasses.replace(task, cfg=dataclasses.replace(task.cfg, **settings))


@pytest.mark.parametrize(
    ("name", "values", "value", "beyond"),
    [
        ("lr", [0.1, 0.3], 0.3, 0.9),
        ("lr", [0.1, 0.3], 0.1, 0.1 / 3),
        ("lr", [1e-7, 0.3], 0.3, 3.0),  # at most a factor of 10
        ("lr", [0.1, 0.3, 0.5], 0.3, None),
        ("lr", [0.3], 0.3, None),  # not to be chosen
        ("weight_decay", [0.0, 0.1], 0.0, None),
        ("weight_decay", [0.0, 0.1], 0.1, 1.0),
        ("weight_decay", [1.0, 100.0], 100.0, None),  # the largest possible
    ],
)
def test_beyond_the_edge(name, values, value, beyond):
    found = next_beyond(values, Candidate(**{"lr": 1.0, "weight_decay": 1.0} | {name: value}), name)
    assert found == (None if beyond is None else pytest.approx(beyond))


def test_rounds_drop_most_candidates_early():
    assert round_lengths(35, 50, FULL) == [(50, 35, 1)]
    assert round_lengths(35, 50, HALVING) == [(4, 35, 16), (12, 16, 6), (34, 6, 1)]
    assert round_lengths(10, 5, HALVING) == [(2, 10, 6), (3, 6, 1)]  # a round that drops nobody is left out
    assert round_lengths(35, 2, HALVING) == [(1, 35, 16), (1, 16, 1)]
    assert round_lengths(35, 1, HALVING) == [(1, 35, 1)]
    assert round_lengths(4, 50, HALVING) == [(50, 4, 1)]


def test_what_stays_to_the_end_learns_as_in_the_whole_sweep():
    """Rounds that keep the winner choose the same epoch with the same accuracy, and answer the same."""
    task = _task(linear_lrs=(1e-6, 0.1, 0.2, 1.0), linear_weight_decays=(0.0, 1e-3, 0.01, 0.1), linear_epochs=10)

    def batches(positions, seed, epoch):
        return 1, [(torch.from_numpy(task.train_x[positions]), positions)]

    searches = (FULL, Search(rounds=((0.3, 12), (0.6, 9))))
    full, halved = (sweep(task, batches, 10, name="linear", search=search) for search in searches)
    assert halved.chosen == full.chosen
    assert np.array_equal(halved.ranked[0], full.ranked[0])


def test_classifiers_that_are_kept_learn_as_before():
    x, y = (torch.from_numpy(array) for array in _clusters(64))
    candidates = [Candidate(lr=lr, weight_decay=0.01 * lr) for lr in (0.1, 0.2, 0.4)]
    all_of_them, some = (LinearHeads(12, 4, candidates, CPU) for _ in range(2))
    for step in range(10):
        all_of_them.step(x, y, cosine(step, 10))
        some.step(x, y, cosine(step, 10))
        if step == 4:
            some.keep([2, 0])
    assert some.num == 2
    torch.testing.assert_close(some.scores(x), all_of_them.scores(x)[:, [2, 0]])


def test_a_search_takes_a_third_of_the_steps(monkeypatch):
    columns = []
    real = LinearHeads.step
    monkeypatch.setattr(LinearHeads, "step", lambda self, x, y, f: columns.append(self.num) or real(self, x, y, f))
    task = _task(linear_epochs=50, sgd_batch_size=270)
    for name, most in (("full", 35 * 50 + 2 * 50), ("halving", (35 * 50 + 2 * 50) / 2)):
        columns.clear()
        linear(_with(task, search=name))
        assert most / 3 < sum(columns) <= most
