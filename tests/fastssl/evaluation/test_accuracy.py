"""Accuracies against loops, intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from fastssl.evaluation.accuracy import judge, t_interval, wilson_interval
from fastssl.evaluation.task import rank_classes


def test_accuracies_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    test_y = rng.integers(0, 7, 40)  # class 7 has no image
    ranked = [rank_classes(rng.normal(size=(40, 8))) for _ in range(3)]
    found = judge(ranked, test_y, 8)
    top1 = [np.mean([answer[i, 0] == test_y[i] for i in range(40)]) for answer in ranked]
    top5 = [np.mean([test_y[i] in answer[i] for i in range(40)]) for answer in ranked]
    assert found["top1_each"] == pytest.approx(top1)
    assert found["top1"] == pytest.approx(np.mean(top1))
    assert found["top1_sd"] == pytest.approx(np.std(top1, ddof=1))
    assert found["top5"] == pytest.approx(np.mean(top5))
    assert found["per_class"][7] is None
    of_class = [[answer[i, 0] == 2 for i in range(40) if test_y[i] == 2] for answer in ranked]
    assert found["per_class"][2] == pytest.approx(np.mean(of_class))
    assert found["interval95_repetitions"] == pytest.approx(t_interval(top1))
    assert found["interval95_test_images"] == pytest.approx(wilson_interval(float(np.mean(top1)), 40))


def test_one_repetition_has_no_spread_and_five_classes_no_top5():
    found = judge([np.array([[0, 1, 2, 3, 4], [1, 0, 2, 3, 4]])], np.array([0, 0]), 5)
    assert (found["top1"], found["top5"], found["top1_sd"], found["interval95_repetitions"]) == (0.5, None, None, None)


@pytest.mark.parametrize("num", [2, 3, 10])
def test_t_interval_is_scipys(num):
    values = np.random.default_rng(num).normal(0.7, 0.02, num).tolist()
    expected = stats.t.interval(0.95, num - 1, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(expected, rel=1e-12)
    assert t_interval(values[:1]) is None


@pytest.mark.parametrize(("hits", "num"), [(0, 10), (10, 10), (3, 10), (470, 500)])
def test_wilson_interval_is_scipys(hits, num):
    expected = stats.binomtest(hits, num).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / num, num) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_equal_scores_rank_the_lower_class_first():
    assert rank_classes(np.array([[0.0, 2.0, 2.0, -1.0, 0.0, -3.0]])).tolist() == [[1, 2, 0, 4, 3]]
