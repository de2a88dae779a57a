"""Estimated costs: they grow with the sizes, and what does not fit is left out in the order of importance."""

import dataclasses
import math

import pytest

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.cost import Job, Sizes, is_path, linear_search, within
from fastssl.evaluation.linear_heads import FULL, HALVING, WIDENED
from fastssl.evaluation.protocols import PROTOCOLS

CIFAR100_PIXELS = Sizes(num_train=50_000, num_test=10_000, num_features=3072, num_classes=100, image_s=1e-3)
DIGITS = Sizes(num_train=1297, num_test=500, num_features=64, num_classes=10, image_s=1e-4)
CFG = EvalConfig(few_labels=(5,))


def _job(encoder: str, protocol: str, cost_s: float, *, encode_s: float = 0.0, is_asked_for: bool = False) -> Job:
    return Job(encoder=encoder, protocol=protocol, cost_s=cost_s, encode_s=encode_s, is_asked_for=is_asked_for)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_costs_more_with_more_of_everything_it_depends_on(name):
    cost_s = PROTOCOLS[name].cost_s
    base = cost_s(CFG, CIFAR100_PIXELS)
    assert 0 < cost_s(CFG, DIGITS) < base
    fields = ("num_train", "image_s") if name == "finetune" else ("num_features", "num_train")
    if name == "few_label":
        fields = ("num_features", "num_classes")
    for field in fields:
        larger = dataclasses.replace(CIFAR100_PIXELS, **{field: 2 * getattr(CIFAR100_PIXELS, field)})
        assert base < cost_s(CFG, larger) <= 4.1 * base
    assert cost_s(CFG, dataclasses.replace(CIFAR100_PIXELS, num_cores=0)) <= base


def test_short_searches_cost_less_and_are_used_where_the_whole_ones_are_slow():
    whole, short = EvalConfig(search="full"), EvalConfig(search="halving")
    for name in ("linear", "logistic"):
        cost_s = PROTOCOLS[name].cost_s
        assert cost_s(short, CIFAR100_PIXELS) < 0.5 * cost_s(whole, CIFAR100_PIXELS)
        assert cost_s(CFG, CIFAR100_PIXELS) == cost_s(short, CIFAR100_PIXELS) > 300
    assert linear_search(CFG, CIFAR100_PIXELS) is HALVING
    assert linear_search(CFG, DIGITS) is WIDENED
    assert linear_search(CFG, dataclasses.replace(CIFAR100_PIXELS, num_features=64, num_cores=0)) is WIDENED
    assert linear_search(whole, CIFAR100_PIXELS) is FULL
    assert linear_search(short, DIGITS) is HALVING
    assert is_path(CFG, CIFAR100_PIXELS)
    assert is_path(short, DIGITS)
    assert not is_path(CFG, DIGITS)
    assert not is_path(whole, CIFAR100_PIXELS)


def test_the_most_important_jobs_that_fit_are_kept_and_features_are_paid_once():
    jobs = [
        _job("a", "knn", 3, encode_s=10),
        _job("a", "linear", 20),
        _job("b", "knn", 3, encode_s=10),
        _job("b", "linear", 5, encode_s=10),
    ]
    kept, left_out, expected_s = within(jobs, 31.0)
    assert kept == [jobs[0], jobs[2], jobs[3]]
    assert left_out == [jobs[1]]
    assert expected_s == 3 + 10 + 3 + 10 + 5
    assert within(jobs, None) == (jobs, [], 51)


def test_the_first_job_and_what_is_asked_for_run_in_any_case():
    jobs = [_job("a", "knn", 100), _job("a", "linear", 5), _job("b", "knn", math.inf), _job("b", "x", 9)]
    assert within(jobs, 1.0) == (jobs[:1], jobs[1:], 100)
    asked = [*jobs[:3], dataclasses.replace(jobs[3], is_asked_for=True)]
    assert within(asked, 1.0)[0] == [asked[0], asked[3]]


def test_a_job_that_cannot_run_is_left_out_whatever_the_limit():
    jobs = [_job("b", "linear", 1, encode_s=math.inf), _job("a", "knn", 5), _job("b", "knn", math.inf)]
    for limit_s in (None, 1.0, math.inf):
        assert within(jobs, limit_s) == ([jobs[1]], [jobs[0], jobs[2]], 5)
    assert within([dataclasses.replace(jobs[0], is_asked_for=True)], None)[0]
