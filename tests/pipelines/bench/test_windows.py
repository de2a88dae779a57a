"""Streams are measured in turns, in processes of their own; one that fails leaves a reason and not a hang."""

import itertools
import os
import time

import pytest

from pipelines.bench.streams import Job, Stream
from pipelines.bench.windows import measure_in_turns
from pipelines.errors import DataError
from pipelines.views import ViewsConfig

JOB = Job(beton="", views=ViewsConfig(), batch_size=10, num_threads=1, seed=0)


def steady(job: Job) -> Stream:
    """A batch every 10 ms."""
    return Stream((time.sleep(0.01) for _ in itertools.count()), num_ahead=0)


def refused(job: Job) -> Stream:
    raise DataError("this one needs a package")


def broken(job: Job) -> Stream:
    raise ZeroDivisionError("by zero")


def dead(job: Job) -> Stream:
    os._exit(1)


@pytest.fixture(scope="module")
def measured():
    streams = {"steady": steady, "refused": refused, "broken": broken, "dead": dead}
    return measure_in_turns(streams, JOB, num_repetitions=2, window_s=0.2, say=lambda message: None)


def test_a_stream_gives_a_window_a_repetition(measured):
    assert measured["steady"].reason is None
    assert len(measured["steady"].windows) == 2
    for window in measured["steady"].windows:
        assert 0 < window.img_per_s <= 1000  # ten images in at least 10 ms
        assert 0 <= window.busy_elsewhere_fraction <= 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("refused", "this one needs a package"),
        ("broken", "ZeroDivisionError: by zero"),
        ("dead", "its process ended"),
    ],
)
def test_what_cannot_be_measured_says_why_in_one_line(measured, name, reason):
    assert measured[name].windows == []
    assert measured[name].reason == reason
