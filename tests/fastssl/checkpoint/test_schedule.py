"""When checkpoints fall due, with a clock that the tests turn."""

import itertools

import pytest

from fastssl.checkpoint.schedule import CheckpointRule
from fastssl.config import RunConfig

MINUTE_S = 60.0


class Run:
    """Steps of equal length under a rule; saves take `save_s` each."""

    def __init__(self, *, step_s: float, steps_per_epoch: int, num_epochs: int, save_s: float, **settings):
        self.now_s = 1e6
        self._step_s, self._save_s = step_s, save_s
        self._total_steps = steps_per_epoch * num_epochs
        self._rule = CheckpointRule(
            RunConfig(**settings),
            steps_per_epoch=steps_per_epoch,
            total_steps=self._total_steps,
            clock=lambda: self.now_s,
        )

    def saves(self) -> dict[int, float]:
        """The steps with a checkpoint, and when each was complete, in seconds from the start."""
        start_s, found = self.now_s, {}
        for step in range(1, self._total_steps + 1):
            self.now_s += self._step_s
            if self._rule.is_due_at(step) or self._rule.is_due_by_clock(step):
                with self._rule.measured_save():
                    self.now_s += self._save_s
                found[step] = self.now_s - start_s
        return found


def test_short_epochs_are_saved_at_their_ends_for_a_hundredth_of_the_time():
    run = Run(step_s=0.5, steps_per_epoch=8, num_epochs=200, save_s=0.2)  # an epoch of 4 s, an interval of 20 s
    saves = run.saves()
    assert list(saves)[:4] == [8, 48, 88, 128]  # the first epoch's end, then every fifth
    assert all(step % 8 == 0 for step in saves)
    assert 1600 in saves  # the last
    assert 0.2 * len(saves) <= 0.011 * 800  # the first and the last come whatever they cost


def test_an_epoch_that_ends_soon_is_waited_for_and_a_long_one_is_not():
    run = Run(step_s=1.0, steps_per_epoch=230, num_epochs=3, save_s=1.0)  # intervals of 100 s, of 125 s in mid-epoch
    assert list(run.saves()) == [230, 355, 460, 585, 690]
    run = Run(step_s=1.0, steps_per_epoch=110, num_epochs=6, save_s=1.0)
    assert list(run.saves()) == [110, 220, 330, 440, 550, 660]


def test_the_first_checkpoint_of_a_long_epoch_comes_after_ten_minutes():
    saves = Run(step_s=1.0, steps_per_epoch=1000, num_epochs=1, save_s=10.0).saves()
    assert list(saves) == [600, 1000]


@pytest.mark.parametrize("steps_per_epoch", [7, 25, 29, 31, 500])
def test_slow_saves_are_at_most_half_an_hour_apart(steps_per_epoch):
    run = Run(step_s=MINUTE_S, steps_per_epoch=steps_per_epoch, num_epochs=20, save_s=30.0)  # 100 of them: 50 minutes
    times_s = [0.0, *run.saves().values()]
    gaps_s = [late - early - 30.0 for early, late in itertools.pairwise(times_s)]
    assert max(gaps_s[1:]) <= 30 * MINUTE_S + MINUTE_S  # a step is never broken off


def test_minutes_that_were_asked_for():
    run = Run(step_s=MINUTE_S, steps_per_epoch=3, num_epochs=8, save_s=0.0, checkpoint_every_minutes=5)
    assert list(run.saves()) == [6, 12, 18, 24]
    run = Run(step_s=MINUTE_S, steps_per_epoch=100, num_epochs=1, save_s=0.0, checkpoint_every_minutes=32)
    assert list(run.saves()) == [40, 80, 100]


def test_counted_checkpoints_do_not_depend_on_the_clock():
    for step_s in (1e-3, 1e4):
        for settings, expected in (
            ({"checkpoint_every_epochs": 2}, [8, 16, 20]),
            ({"checkpoint_every_steps": 3}, [3, 6, 9, 12, 15, 18, 20]),
            ({"checkpoint_every_steps": 15, "checkpoint_every_epochs": 3}, [12, 15, 20]),
            ({"checkpoint_every_epochs": 4, "keep_every_epochs": 3}, [12, 16, 20]),
        ):
            run = Run(step_s=step_s, steps_per_epoch=4, num_epochs=5, save_s=1.0, **settings)
            assert list(run.saves()) == expected, settings


def test_checkpoints_to_keep_exist_whatever_the_clock_says():
    run = Run(step_s=1e-3, steps_per_epoch=4, num_epochs=9, save_s=1.0, keep_every_epochs=3)
    assert list(run.saves()) == [4, 12, 24, 36]


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint_every_minutes": -1},
        {"checkpoint_every_epochs": 0},
        {"checkpoint_every_minutes": 5, "checkpoint_every_steps": 100},
        {"checkpoint_every_minutes": 5, "checkpoint_every_epochs": 1},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RunConfig(**settings)
