"""Evaluation against brute force, with spies on what it may read."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fastssl.evaluation import few_label, logistic
from fastssl.evaluation.accuracy import judge
from fastssl.evaluation.config import EvalConfig, ProtocolName
from fastssl.evaluation.features import encode_batches
from fastssl.evaluation.few_label import check_few_label, draw_labelled
from fastssl.evaluation.knn import bounded_k, bounded_k_line, check_knn, knn, knn_votes
from fastssl.evaluation.protocols import PROTOCOLS, evaluate
from fastssl.evaluation.results import SHOWN, table_row
from fastssl.evaluation.task import Task, rank_classes, split_validation
from fastssl.tracking.result_rows import format_table
from pipelines.batch import Batch


def _clusters(num: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(4, 12))
    labels = np.arange(num) % 4
    return (centres[labels] + spread * rng.normal(size=(num, 12))).astype(np.float32), labels.astype(np.int64)


def _task(num: int = 200, spread: float = 1.5, **settings) -> tuple[Task, np.ndarray]:
    (train_x, train_y), (test_x, test_y) = _clusters(num, spread=spread), _clusters(60, seed=1, spread=spread)
    cfg = EvalConfig(**{"knn_k": 20} | settings)
    return Task(cfg=cfg, train_x=train_x, train_y=train_y, test_x=test_x, num_classes=4), test_y


# --- features


class _Loader:
    def __init__(self, num: int) -> None:
        self.images = torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __iter__(self):
        for ids in torch.arange(len(self.images)).split(4):
            yield Batch(views=[self.images[ids]], labels=ids * 2, sample_ids=ids)


def test_features_come_in_order_in_eval_mode_and_modes_return():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone[1].eval()
    backbone[1].running_mean.fill_(0.5)
    loader = _Loader(10)
    features = np.concatenate(list(encode_batches(backbone, loader)))
    assert (features.dtype, features.shape) == (np.float32, (10, 5))
    assert [module.training for module in backbone] == [True, False, True, True]
    assert torch.equal(backbone[1].running_mean, torch.full((5,), 0.5))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features), backbone.eval()(loader.images))


def test_features_restore_modes_after_an_error():
    backbone = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        list(encode_batches(backbone, _Loader(4)))
    assert backbone.training


# --- kNN


def _brute_force_knn(train_x, train_y, test_x, k, temperature, num_classes):
    predictions = []
    for x in test_x:
        cosines = [float(x @ t) / float(np.linalg.norm(x) * np.linalg.norm(t)) for t in train_x]
        votes = [0.0] * num_classes
        for i in sorted(range(len(train_x)), key=lambda i: -cosines[i])[:k]:
            votes[train_y[i]] += math.exp(cosines[i] / temperature)
        predictions.append(int(np.argmax(votes)))
    return predictions


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (40, 0.02), (40, 1.0), (90, 0.5)])
def test_knn_votes_as_the_loop_does(k, temperature, monkeypatch):
    monkeypatch.setattr("fastssl.evaluation.knn._CHUNK_ROWS", 16)  # several chunks, the last one short
    train_x, train_y = _clusters(90, spread=2.0)
    test_x, _ = _clusters(41, seed=1, spread=2.0)
    # Asked for together with more neighbours: each pair's answer is its own.
    [votes, _] = knn_votes(train_x, train_y, test_x, [(k, temperature), (90, 0.3)], num_classes=4)
    assert votes.argmax(1).tolist() == _brute_force_knn(train_x, train_y, test_x, k, temperature, 4)


def test_knn_weights_beat_a_majority_of_far_neighbours():
    train_x = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    train_y = np.array([0, 1, 1])
    near, flat = knn_votes(train_x, train_y, train_x[:1], [(3, 0.1), (3, 10.0)], num_classes=2)
    assert (near[0].argmax(), flat[0].argmax()) == (0, 1)


def test_knn_survives_a_tiny_temperature():
    train_x, train_y = _clusters(20)
    [votes] = knn_votes(train_x, train_y, train_x, [(5, 1e-3)], num_classes=4)
    assert votes.argmax(1).tolist() == train_y.tolist()


@pytest.mark.parametrize(("pair", "key"), [((21, 0.1), "knn_k"), ((1, 0.0), "knn_temperature")])
def test_knn_names_the_key(pair, key):
    train_x, train_y = _clusters(20)
    with pytest.raises(ValueError, match=rf"eval\.{key}"):
        knn_votes(train_x, train_y, train_x, [pair], num_classes=4)


def test_knn_chooses_on_the_validation_part_and_votes_with_all():
    task, _ = _task(knn_k=(1, 15, 150), knn_temperature=(0.05, 1.0), spread=2.5)
    fit, validation = split_validation(task.train_y)
    top1 = {}
    for k in (1, 15, 150):
        for temperature in (0.05, 1.0):
            [votes] = knn_votes(
                task.train_x[fit], task.train_y[fit], task.train_x[validation], [(k, temperature)], num_classes=4
            )
            top1[k, temperature] = (votes.argmax(1) == task.train_y[validation]).mean()
    outcome = knn(task)["knn"]
    best = (outcome.chosen["k"], outcome.chosen["temperature"])
    assert top1[best] == max(top1.values()) == outcome.chosen["validation_top1"] > min(top1.values())
    [votes] = knn_votes(task.train_x, task.train_y, task.test_x, [best], num_classes=4)
    assert np.array_equal(outcome.ranked[0], rank_classes(votes))


@pytest.mark.parametrize(
    ("asked", "bounded", "line"),
    [
        (20, (20,), None),
        (201, (200,), "k = 200 instead of 201: there are no more labelled training images"),
        ((5, 181, 500), (5, 180), "k = 180 instead of 500"),  # of those that vote while k is chosen
        (None, (50,), "k = 50 instead of 200: a class has that many training images on average"),
    ],
)
def test_neighbours_are_bounded_by_the_images_and_a_line_says_so(asked, bounded, line):
    task, _ = _task(knn_k=asked)
    assert bounded_k(task.cfg, task.train_y) == bounded
    found = bounded_k_line(task.cfg, task.train_y)
    assert found is None if line is None else line in (found or "")
    chosen = knn(task)["knn"].chosen
    assert chosen["k"] in bounded
    assert chosen.get("k_asked_for") == (None if chosen["k"] in np.atleast_1d(asked) else np.max(asked or 200))


def test_a_choice_of_neighbours_from_too_few_images_is_refused():
    with pytest.raises(ValueError, match="at least 10"):
        check_knn(EvalConfig(knn_k=(1, 5)), np.arange(9) % 2)
    check_knn(EvalConfig(), np.arange(9) % 2)


# --- logistic regression


def test_logistic_chooses_c_on_the_held_out_tenth_and_reads_test_once(monkeypatch):
    task, _ = _task(search="full")
    fit_ids, holdout_ids = split_validation(task.train_y)
    fitted, scored = [], []
    real_fit, real_scores = logistic.fit_logistic, logistic.class_scores

    class Spy:
        def __init__(self, model):
            self.model = model

        def score(self, x, y):
            scored.append(x)
            return self.model.score(x, y)

        def __getattr__(self, name):
            return getattr(self.model, name)

    def spy_fit(x, y, c):
        fitted.append((x, c))
        return Spy(real_fit(x, y, c))

    def spy_scores(model, x, num_classes):
        scored.append(x)
        return real_scores(model, x, num_classes)

    monkeypatch.setattr(logistic, "fit_logistic", spy_fit)
    monkeypatch.setattr(logistic, "class_scores", spy_scores)
    outcome = logistic.logistic(task)["logistic"]
    *choosing, last = fitted
    assert [c for _, c in choosing] == list(logistic.C_GRID)
    assert all(np.array_equal(x, task.train_x[fit_ids]) for x, _ in choosing)
    assert np.array_equal(last[0], task.train_x)
    assert last[1] == outcome.chosen["c"]
    assert all(np.array_equal(x, task.train_x[holdout_ids]) for x in scored[:-1])
    assert np.array_equal(scored[-1], task.test_x)
    assert outcome.chosen["converged"]


def test_logistic_ranks_as_the_model_predicts():
    task, test_y = _task()
    outcome = logistic.logistic(task)["logistic"]
    model = logistic.fit_logistic(task.train_x, task.train_y, outcome.chosen["c"])
    assert np.array_equal(outcome.ranked[0][:, 0], model.predict(task.test_x))
    assert judge(outcome.ranked, test_y, 4)["top1"] > 0.7


def test_logistic_scores_two_classes_and_leaves_out_what_it_has_not_met():
    train_x, train_y = _clusters(80)
    two = train_y % 2 * 3  # 0 and 3
    model = logistic.fit_logistic(train_x, two, 1.0)
    scores = logistic.class_scores(model, train_x, 5)
    assert np.array_equal(scores.argmax(1), model.predict(train_x))
    assert np.isneginf(scores[:, [1, 2, 4]]).all()


def test_logistic_takes_the_strongest_penalty_of_equals():
    task, _ = _task(80, spread=1e-3)
    assert logistic.logistic(task)["logistic"].chosen["c"] == logistic.C_GRID[0]


def test_the_path_finds_the_penalty_of_the_whole_grid_with_fewer_iterations(monkeypatch):
    """Weak penalties overfit these features: the path ends before it comes to the weakest."""
    rng = np.random.default_rng(0)
    task, test_y = _task(400, spread=4.0)
    noise = {name: rng.normal(size=(len(x), 150)) for name, x in (("train_x", task.train_x), ("test_x", task.test_x))}
    wide = {name: np.hstack([getattr(task, name), found]).astype(np.float32) for name, found in noise.items()}
    task = dataclasses.replace(task, **wide)
    fits: list[int] = []
    real = logistic.LogisticRegression.fit

    def fit(self, x, y):
        found = real(self, x, y)
        fits.append(int(self.n_iter_.max()))
        return found

    monkeypatch.setattr(logistic.LogisticRegression, "fit", fit)
    found, num_fits = {}, {}
    for search in ("full", "halving"):
        fits.clear()
        changed = dataclasses.replace(task, cfg=dataclasses.replace(task.cfg, search=search))
        found[search], num_fits[search] = logistic.logistic(changed)["logistic"], len(fits)
    top1 = {search: judge(outcome.ranked, test_y, 4)["top1"] for search, outcome in found.items()}
    error = math.sqrt(top1["full"] * (1 - top1["full"]) / len(test_y))
    assert abs(top1["full"] - top1["halving"]) <= error
    assert num_fits == {"full": 6, "halving": num_fits["halving"]}
    assert found["halving"].chosen["at_edge_of_grid"] == []


@pytest.mark.parametrize(("grid", "best"), [((1e-5, 1e-4), 1e-3), ((1.0, 10.0), 0.1)])
def test_the_penalties_are_widened_at_either_edge(grid, best, monkeypatch):
    if best < grid[0]:  # few images with much noise
        rng = np.random.default_rng(0)
        x = rng.normal(size=(600, 100)).astype(np.float32)
        y = (x[:, :4] + 1.5 * rng.normal(size=(600, 4))).argmax(1)
    else:
        x, y = load_digits(return_X_y=True)
    task = Task(cfg=EvalConfig(), train_x=x.astype(np.float32), train_y=y, test_x=x[:100], num_classes=10)
    monkeypatch.setattr(logistic, "C_GRID", grid)
    full, widened = (
        logistic.logistic(dataclasses.replace(task, cfg=EvalConfig(search=search)))["logistic"].chosen
        for search in ("full", "auto")
    )
    assert full["c"] in grid
    assert full["at_edge_of_grid"] == ["c"]
    assert widened["c"] == best
    assert widened["validation_top1"] > full["validation_top1"]


def test_logistic_says_when_it_did_not_converge(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 2)
    task, _ = _task(80, spread=2.0)
    assert not logistic.logistic(task)["logistic"].chosen["converged"]


# --- few labels


def test_draws_are_balanced_reproducible_and_differ():
    labels = _clusters(200)[1]
    ids = draw_labelled(labels, 5, draw=3)
    assert np.bincount(labels[ids]).tolist() == [5, 5, 5, 5]
    assert len(set(ids.tolist())) == 20
    assert np.array_equal(ids, draw_labelled(labels, 5, draw=3))
    assert not np.array_equal(ids, draw_labelled(labels, 5, draw=4))


def _few(task: Task, test_y: np.ndarray) -> dict[str, dict]:
    return dict(evaluate(task, test_y, ["few_label"]))


def test_few_labels_average_their_draws():
    task, test_y = _task(few_labels=(3,), num_draws=4)
    result = _few(task, test_y)
    assert result == _few(task, test_y)
    top1 = []
    for draw in range(4):
        ids = draw_labelled(task.train_y, 3, draw)
        distances = ((task.test_x[:, None] - task.train_x[ids][None]) ** 2).sum(2)
        top1.append((task.train_y[ids][distances.argmin(1)] == test_y).mean())
    assert result["nearest_3_labels_per_class"]["top1_each"] == pytest.approx(top1)
    assert result["logistic_3_labels_per_class"]["top1_sd"] > 0


def test_few_labels_do_not_depend_on_the_scale_or_the_origin():
    task, test_y = _task(few_labels=(3,), num_draws=2)
    moved = dataclasses.replace(task, train_x=1e3 * task.train_x + 5, test_x=1e3 * task.test_x + 5)
    assert _few(task, test_y) == _few(moved, test_y)


def test_few_labels_fit_only_what_was_drawn(monkeypatch):
    task, test_y = _task(few_labels=(3,), num_draws=2)
    sizes = []
    real = few_label._rank_by_logistic
    counted = lambda x, y, t, c: sizes.append(len(x)) or real(x, y, t, c)  # noqa: E731
    monkeypatch.setitem(few_label._CLASSIFIERS, "logistic", counted)
    _few(task, test_y)
    assert sizes == [12, 12]


def test_too_few_labels_name_the_class():
    labels = np.array([0] * 10 + [1] * 4)
    with pytest.raises(ValueError, match=r"eval\.few_labels asks for 5 images per class, but class 1 has only 4"):
        check_few_label(EvalConfig(few_labels=(2, 5)), labels)


# --- all of it


def test_no_choice_depends_on_test_labels():
    task, test_y = _task(spread=1.0, knn_k=(5, 20), few_labels=(3,), num_draws=2, linear_epochs=3)
    names: list[ProtocolName] = ["knn", "linear", "logistic", "few_label"]
    right, wrong = (dict(evaluate(task, labels, names)) for labels in (test_y, (test_y + 1) % 4))
    assert [result["chosen"] for result in right.values()] == [result["chosen"] for result in wrong.values()]
    for name in right:
        assert right[name]["top1"] > 0.6 > 0.4 > wrong[name]["top1"]


def test_the_table_of_protocols_is_what_the_configuration_knows():
    assert list(PROTOCOLS) == list(typing.get_args(ProtocolName))


def test_what_needs_images_is_left_out_where_there_are_none():
    task, test_y = _task()
    assert [name for name, _ in evaluate(task, test_y, ["linear_augmented", "finetune", "knn"])] == ["knn"]


def test_table_has_a_row_each_and_aligned_columns():
    judged = judge([np.array([[0, 1, 2, 3, 4]] * 10)], np.array([0] * 9 + [9]), 10)
    line = {"encoder": "raw pixels", "name": "knn", "repeated_over": "nothing", "chosen": {"k": 20}} | judged
    twice = judge([np.array([[0, 1, 2, 3, 4]]), np.array([[1, 0, 2, 3, 4]])], np.array([0]), 10)
    other = line | {"encoder": "pre-trained encoder", "repeated_over": "seeds", "chosen": {"lr": 0.01}} | twice
    lines = format_table([table_row(line), table_row(other)], SHOWN).splitlines()
    assert lines[0].startswith("encoder              protocol  top-1 in %")
    assert lines[1].split() == ["raw", "pixels", "knn", "90.0", "90.0", "59.6", "to", "98.2", "-", "k=20"]
    assert lines[2].startswith("pre-trained encoder  knn       50.0 ± 70.7")
    assert "(2 seeds)" in lines[2]
    assert lines[1].index("k=20") == lines[2].index("lr=0.01") == lines[0].index("settings")


@pytest.mark.parametrize(
    "field",
    [f.name for f in dataclasses.fields(EvalConfig) if f.name not in ("baselines", "feature_dtype", "every_epochs")],
)
def test_config_names_the_field(field):
    bad = {"few_labels": (0,), "what": (), "augment": {"flip_q": 1}, "finetune_weight_decay": -1, "time_fraction": -1}
    bad = bad.get(field, 0)
    if field == "linear_weight_decays":
        bad = (0.0, -1.0)
    elif field in ("linear_lrs", "finetune_lrs"):
        bad = ()
    with pytest.raises(ValueError, match=f"^{field}"):
        EvalConfig(**{field: bad})
