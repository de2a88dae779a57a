"""The number of epochs: what the images want, and what the time allows."""

from dataclasses import replace

import pytest

from fastssl.errors import UserError
from fastssl.plan.epochs import choose_length, describe_time, warmup_choice
from fastssl.plan.measure import StepCost
from tests.fastssl.plan.test_choices import CPU

COST = StepCost(step_s=1.0, start_s=10.0, num_steps=5, memory_bytes=1 << 30)
FACTS = replace(CPU, num_images=1_000)  # of batch 100: ten seconds per epoch


def test_all_wanted_epochs_where_they_fit():
    length = choose_length(FACTS, COST, 100, hours=1)
    assert (length.num_epochs, length.seconds) == (100, 1010)


@pytest.mark.parametrize(("num_classes", "epochs"), [(0, 35), (3, 27)])  # (360 / (1 or 1.25) - 10) / 10
def test_as_many_as_fit_into_the_time_with_the_evaluation(num_classes, epochs):
    length = choose_length(replace(FACTS, num_classes=num_classes), COST, 100, hours=0.1)
    assert length.num_epochs == epochs
    assert "0.1 hours" in length.why
    assert "100" in length.why


def test_too_little_time_for_an_epoch_says_how_much_is_needed():
    with pytest.raises(UserError, match="--hours") as caught:
        choose_length(FACTS, COST, 100, hours=0.001)
    needed = float(str(caught.value).rsplit(" ", 1)[-1])
    assert choose_length(FACTS, COST, 100, hours=needed).num_epochs >= 1


def test_without_a_time_a_slow_machine_gets_some_epochs_and_is_told_what_all_would_take():
    length = choose_length(FACTS, replace(COST, step_s=60.0), 100)
    assert length.num_epochs == 10
    assert "100 are usual" in length.why
    assert describe_time(100 * 600) in length.why


def test_given_epochs_are_kept():
    assert choose_length(FACTS, COST, 100, num_epochs=7).num_epochs == 7


def test_warm_up_ends_before_the_run():
    assert warmup_choice(1, "byol").value < 1
    assert warmup_choice(500, "byol").value == 10
    assert warmup_choice(1, "mio_small").value == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (7200, "2 h"),
        (11_100, "3 h 5 min"),
        (190_000, "2 days 4 h"),
    ],
)
def test_times_for_people(seconds, text):
    assert describe_time(seconds) == text
