"""When to save a checkpoint: at fixed steps, or by the clock of the first rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastssl.config import RunConfig

# Automatic interval: this many times the duration of the last save, so that saves cost at most 1% of the run.
INTERVAL_PER_COST = 100
MAX_INTERVAL_S = 30 * 60.0
# Before any save has been measured: save at the end of the first epoch, or after this time if the epoch is longer.
FIRST_INTERVAL_S = 10 * 60.0
# Wait up to a quarter of an interval for the end of an epoch: a checkpoint there has no unfinished epoch.
MID_EPOCH_FACTOR = 1.25


class CheckpointRule:
    """Decides after each step; `is_due_at` is equal on all ranks, `is_due_by_clock` is for the first rank only."""

    def __init__(
        self, cfg: RunConfig, *, steps_per_epoch: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock.

        Args:
            cfg: Provides `checkpoint_every_*` and `keep_every_epochs`.
            steps_per_epoch: Optimizer steps per epoch.
            total_steps: Optimizer steps of the whole run.
            clock: Returns the time in seconds.
        """
        self._cfg, self._clock = cfg, clock
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._uses_clock = not cfg.checkpoint_every_steps and cfg.checkpoint_every_epochs is None
        self._last_save_s = clock()
        self._cost_s: float | None = None  # of the last save

    def is_due_at(self, step: int) -> bool:
        """Whether a checkpoint is due after this step (1-based), independently of the clock."""
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        by_epochs = (self._cfg.checkpoint_every_epochs, self._cfg.keep_every_epochs)
        at_epoch_end = step_in_epoch == 0 and any(every and epoch % every == 0 for every in by_epochs)
        every = self._cfg.checkpoint_every_steps
        return step == self._total_steps or at_epoch_end or bool(every and step % every == 0)

    def is_due_by_clock(self, step: int) -> bool:
        """Whether the interval has passed at this step; the answer may differ between ranks."""
        if not self._uses_clock:
            return False
        at_epoch_end_s, mid_epoch_s = self._intervals_s()
        limit_s = mid_epoch_s if step % self._steps_per_epoch else at_epoch_end_s
        return self._clock() - self._last_save_s >= limit_s

    @contextmanager
    def measured_save(self) -> Iterator[None]:
        """Measure the duration of a save; the next interval starts at its end."""
        began_s = self._clock()
        yield
        self._last_save_s = self._clock()
        self._cost_s = self._last_save_s - began_s

    def _intervals_s(self) -> tuple[float, float]:
        """Time from the last save to the next, in seconds: at the end of an epoch, and mid-epoch."""
        if self._cfg.checkpoint_every_minutes:
            interval_s = 60 * self._cfg.checkpoint_every_minutes
            return interval_s, MID_EPOCH_FACTOR * interval_s
        if self._cost_s is None:
            return 0.0, FIRST_INTERVAL_S
        interval_s = min(INTERVAL_PER_COST * self._cost_s, MAX_INTERVAL_S)
        return interval_s, min(MID_EPOCH_FACTOR * interval_s, MAX_INTERVAL_S)
