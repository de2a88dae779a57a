"""A few steps are measured in another process; what keeps them from running is told as a training would."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from fastssl.errors import UserError
from fastssl.plan.measure import MIN_STEPS, NUM_WARM_UP, OutOfMemoryError, main, measure
from fastssl.tracking.epoch_stats import EpochStats

GIB = 1 << 30


@contextmanager
def address_space(num_bytes: int) -> Iterator[None]:
    """Limits the memory of programs that are started in the block; this process has its own already."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(tiny_config, **changes):
    text = tiny_config.read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    tiny_config.write_text(text)
    return tiny_config


@pytest.mark.slow
def test_the_steps_of_a_run_cost_time_and_memory_and_leave_nothing(tiny_config):
    cost = measure(tiny_config)
    assert cost.num_steps >= MIN_STEPS
    assert 0 < cost.step_s < 60
    assert cost.start_s > 0
    assert cost.memory_bytes > 50 << 20
    assert not (tiny_config.parent / "run").exists()


def test_what_an_epoch_takes_at_its_end_is_measured_too(tiny_config, tmp_path, monkeypatch):
    ends = []
    real = EpochStats.end_epoch
    monkeypatch.setattr(
        EpochStats, "end_epoch", lambda self, step, num_bad: (ends.append(step), real(self, step, num_bad))
    )
    with patch.dict(os.environ):  # it becomes a rank of its own
        assert main([str(tiny_config), str(tmp_path / "cost.json")]) == 0
    num_steps = NUM_WARM_UP + json.loads((tmp_path / "cost.json").read_text())["num_steps"]
    assert ends == [step for step in range(1, num_steps + 1) if step % 10 == 0]
    assert ends


def test_a_wrong_configuration_is_told_as_a_training_tells_it(tiny_config):
    write(tiny_config, change=("train.beton", "no_such.beton"))
    with pytest.raises(UserError, match=r"no_such\.beton") as caught:
        measure(tiny_config)
    assert "measuring" not in str(caught.value)
    assert not str(caught.value).startswith("fastssl")


@pytest.mark.slow
def test_a_step_that_does_not_fit_into_memory_is_told_apart(tiny_config):
    write(tiny_config, px=("size_px: 16", "size_px: 1024"), batch=("global_batch_size: 128", "global_batch_size: 512"))
    with address_space(8 * GIB), pytest.raises(OutOfMemoryError):
        measure(tiny_config)
