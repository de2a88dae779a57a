"""Evaluation against brute force, with spies on what it may read."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluation import evaluate_arrays, few_label, format_table, logistic
from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.features import extract_features
from fastssl.evaluation.few_label import draw_labelled, evaluate_few_labels
from fastssl.evaluation.knn import knn_predict
from fastssl.evaluation.logistic import evaluate_logistic
from pipelines.batch import Batch
from pipelines.sampler import split_holdout


def _clusters(num: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(4, 12))
    labels = np.arange(num) % 4
    return (centres[labels] + spread * rng.normal(size=(num, 12))).astype(np.float32), labels.astype(np.int64)


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
    features, labels = extract_features(backbone, loader)
    assert (features.dtype, features.shape, labels.dtype) == (np.float32, (10, 5), np.int64)
    assert labels.tolist() == list(range(0, 20, 2))
    assert [module.training for module in backbone] == [True, False, True, True]
    assert torch.equal(backbone[1].running_mean, torch.full((5,), 0.5))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features), backbone.eval()(loader.images))


def test_features_restore_modes_after_an_error():
    backbone = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        extract_features(backbone, _Loader(4))
    assert backbone.training


def test_features_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no images"):
        extract_features(nn.Identity(), [])


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
    predicted = knn_predict(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=4)
    assert predicted.tolist() == _brute_force_knn(train_x, train_y, test_x, k, temperature, 4)


def test_knn_weights_beat_a_majority_of_far_neighbours():
    train_x = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    train_y = np.array([0, 1, 1])
    near = knn_predict(train_x, train_y, train_x[:1], k=3, temperature=0.1, num_classes=2)
    flat = knn_predict(train_x, train_y, train_x[:1], k=3, temperature=10.0, num_classes=2)
    assert (near[0], flat[0]) == (0, 1)


def test_knn_survives_a_tiny_temperature():
    train_x, train_y = _clusters(20)
    predicted = knn_predict(train_x, train_y, train_x, k=5, temperature=1e-3, num_classes=4)
    assert predicted.tolist() == train_y.tolist()


@pytest.mark.parametrize(("fields", "key"), [({"k": 21}, "knn_k"), ({"k": 1, "temperature": 0.0}, "knn_temperature")])
def test_knn_names_the_key(fields, key):
    train_x, train_y = _clusters(20)
    with pytest.raises(ValueError, match=rf"eval\.{key}"):
        knn_predict(train_x, train_y, train_x, num_classes=4, **fields)


# --- logistic regression


def test_logistic_chooses_c_on_the_held_out_tenth_and_reads_test_once(monkeypatch):
    train_x, train_y = _clusters(200, spread=1.5)
    test_x, test_y = _clusters(60, seed=1, spread=1.5)
    fit_ids, holdout_ids = split_holdout(200, 0.1, train_y)
    fitted, scored = [], []
    real_fit = logistic.fit_logistic

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

    monkeypatch.setattr(logistic, "fit_logistic", spy_fit)
    result = evaluate_logistic(train_x, train_y, test_x, test_y)
    *choosing, last = fitted
    assert [c for _, c in choosing] == list(logistic.C_GRID)
    assert all(np.array_equal(x, train_x[fit_ids]) for x, _ in choosing)
    assert np.array_equal(last[0], train_x)
    assert last[1] == result.c
    assert all(np.array_equal(x, train_x[holdout_ids]) for x in scored[:-1])
    assert np.array_equal(scored[-1], test_x)
    assert result.converged


def test_logistic_choice_does_not_depend_on_test_labels():
    train_x, train_y = _clusters(200, spread=1.5)
    test_x, test_y = _clusters(60, seed=1, spread=1.5)
    right = evaluate_logistic(train_x, train_y, test_x, test_y)
    wrong = evaluate_logistic(train_x, train_y, test_x, (test_y + 1) % 4)
    assert right.c == wrong.c
    assert right.top1 > 0.7 > 0.3 > wrong.top1


def test_logistic_takes_the_strongest_penalty_of_equals():
    train_x, train_y = _clusters(80, spread=1e-3)
    assert evaluate_logistic(train_x, train_y, train_x, train_y).c == logistic.C_GRID[0]


def test_logistic_says_when_it_did_not_converge(monkeypatch):
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 2)
    train_x, train_y = _clusters(80, spread=2.0)
    assert not evaluate_logistic(train_x, train_y, train_x, train_y).converged


def test_logistic_needs_ten_images():
    train_x, train_y = _clusters(9)
    with pytest.raises(ValueError, match="at least 10"):
        evaluate_logistic(train_x, train_y, train_x, train_y)


# --- few labels


def test_draws_are_balanced_reproducible_and_differ():
    labels = _clusters(200)[1]
    ids = draw_labelled(labels, 5, draw=3)
    assert np.bincount(labels[ids]).tolist() == [5, 5, 5, 5]
    assert len(set(ids.tolist())) == 20
    assert np.array_equal(ids, draw_labelled(labels, 5, draw=3))
    assert not np.array_equal(ids, draw_labelled(labels, 5, draw=4))


def test_few_labels_average_their_draws():
    train, test = _clusters(200, spread=1.5), _clusters(60, seed=1, spread=1.5)
    result = evaluate_few_labels(*train, *test, num_per_class=3, num_draws=4)
    assert result == evaluate_few_labels(*train, *test, num_per_class=3, num_draws=4)
    top1 = []
    for draw in range(4):
        ids = draw_labelled(train[1], 3, draw)
        distances = ((test[0][:, None] - train[0][ids][None]) ** 2).sum(2)
        top1.append((train[1][ids][distances.argmin(1)] == test[1]).mean())
    assert result.nearest_mean == pytest.approx(np.mean(top1))
    assert result.nearest_sd == pytest.approx(np.std(top1, ddof=1))
    assert result.logistic_sd > 0


def test_few_labels_do_not_depend_on_the_scale_or_the_origin():
    (train_x, train_y), (test_x, test_y) = _clusters(200, spread=1.5), _clusters(60, seed=1, spread=1.5)
    plain = evaluate_few_labels(train_x, train_y, test_x, test_y, num_per_class=3, num_draws=2)
    moved = evaluate_few_labels(1e3 * train_x + 5, train_y, 1e3 * test_x + 5, test_y, num_per_class=3, num_draws=2)
    assert plain == moved


def test_few_labels_fit_only_what_was_drawn(monkeypatch):
    train, test = _clusters(200), _clusters(60, seed=1)
    sizes = []
    real = few_label._logistic_predict
    monkeypatch.setattr(few_label, "_logistic_predict", lambda x, y, t: sizes.append(len(x)) or real(x, y, t))
    evaluate_few_labels(*train, *test, num_per_class=3, num_draws=2)
    assert sizes == [12, 12]


def test_too_few_labels_name_the_class():
    labels = np.array([0] * 10 + [1] * 4)
    with pytest.raises(ValueError, match=r"eval\.few_labels: class 1 has 4"):
        draw_labelled(labels, 5, draw=0)


# --- all of it


def test_arrays_are_flattened_and_k_is_lowered():
    (train_x, train_y), (test_x, test_y) = _clusters(80), _clusters(40, seed=1)
    cfg = EvalConfig(few_labels=(2, 5), num_draws=2)
    result = evaluate_arrays(train_x.reshape(80, 2, 2, 3), train_y, test_x.reshape(40, 2, 2, 3), test_y, cfg)
    assert result == evaluate_arrays(train_x, train_y, test_x, test_y, cfg)
    assert result["knn"]["k"] == 80
    assert result["knn"]["temperature"] == 0.1
    assert list(result["few_label"]) == ["2", "5"]
    assert 0.8 < result["logistic"]["top1"] <= 1


def test_missing_labels_are_refused():
    train_x, train_y = _clusters(80)
    with pytest.raises(ValueError, match="label for every image"):
        evaluate_arrays(train_x, np.full_like(train_y, -1), train_x, train_y, EvalConfig())


def test_table_has_a_row_each_and_aligned_columns():
    few = {"logistic_mean": 0.9, "logistic_sd": 0.012, "nearest_mean": 1.0, "nearest_sd": 0.0}
    result = {"knn": {"top1": 0.987, "k": 200}, "logistic": {"top1": 0.9}, "few_label": {"5": few}}
    lines = format_table({"raw pixels": result, "pre-trained encoder": result}).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[0] == "top-1 in %"
    assert "kNN (k=200)" in lines[0]
    assert "1-NN, 5/class" in lines[0]
    assert lines[2].startswith("raw pixels  ")
    assert lines[3].split() == ["pre-trained", "encoder", "98.7", "90.0", "90.0", "±", "1.2", "100.0", "±", "0.0"]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EvalConfig) if f.name != "baselines"])
def test_config_names_the_field(field):
    bad = (0,) if field == "few_labels" else 0
    with pytest.raises(ValueError, match=f"^{field}"):
        EvalConfig(**{field: bad})
