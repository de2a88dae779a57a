"""The schedules at the steps that matter."""

import itertools
import math

import pytest
import torch

from fastssl.optim.schedules import ema_momentum, learning_rate

RUN = {"base_lr": 0.2, "global_batch_size": 512, "warmup_steps": 10, "total_steps": 110, "final_fraction": 0.1}
PEAK = 0.4


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, PEAK / 11),
        (4, PEAK * 5 / 11),
        (10, PEAK),
        (35, PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)),
        (60, PEAK * 0.55),
        (110, PEAK * 0.1),
        (500, PEAK * 0.1),
    ],
)
def test_learning_rate_at_key_steps(step, expected):
    assert learning_rate(step, **RUN) == pytest.approx(expected)


def test_learning_rate_rises_then_falls():
    rates = [learning_rate(step, **RUN) for step in range(111)]
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_no_warm_up_starts_at_the_peak_and_only_warm_up_never_falls():
    assert learning_rate(0, **RUN | {"warmup_steps": 0}) == pytest.approx(PEAK)
    only_warm_up = RUN | {"warmup_steps": 200}
    assert learning_rate(109, **only_warm_up) == pytest.approx(PEAK * 110 / 201)


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_a_cosine_by_epochs_is_torchs_stepped_once_an_epoch(warmup_epochs):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=PEAK)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=11, eta_min=PEAK * 0.1)
    warmup = {"warmup_steps": warmup_epochs * 10, "total_steps": (11 + warmup_epochs) * 10}
    for epoch in range(11):
        first = (epoch + warmup_epochs) * 10
        rates = [learning_rate(step, **RUN | warmup, steps_per_change=10) for step in range(first, first + 10)]
        assert rates == [pytest.approx(optimizer.param_groups[0]["lr"])] * 10
        optimizer.step()
        scheduler.step()
    assert learning_rate(5, **RUN | {"warmup_steps": 20}, steps_per_change=10) == learning_rate(
        5, **RUN | {"warmup_steps": 20}
    ), "a warm-up rises at every step"


def test_a_warm_up_that_ends_in_mid_epoch_goes_on_at_the_peak():
    settings = RUN | {"warmup_steps": 13}
    assert [learning_rate(step, **settings, steps_per_change=10) for step in range(13, 20)] == [PEAK] * 7
    assert learning_rate(20, **settings, steps_per_change=10) < PEAK


@pytest.mark.parametrize("bad", [{"step": -1}, {"warmup_steps": -1}, {"total_steps": 0}, {"steps_per_change": 0}])
def test_learning_rate_refuses_negative_steps(bad):
    with pytest.raises(ValueError, match="negative"):
        learning_rate(**({"step": 0} | RUN | bad))


def test_ema_momentum_goes_from_base_to_one():
    assert ema_momentum(0, 100, 0.996) == pytest.approx(0.996)
    assert ema_momentum(50, 100, 0.996) == pytest.approx(0.998)
    assert ema_momentum(100, 100, 0.996) == 1.0


@pytest.mark.parametrize("arguments", [(101, 100, 0.9), (-1, 100, 0.9), (0, 100, 1.1)])
def test_ema_momentum_refuses_what_lies_outside(arguments):
    with pytest.raises(ValueError, match="not"):
        ema_momentum(*arguments)
