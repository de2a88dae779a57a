"""When a checkpoint falls due: at counted steps, or by the clock of the first rank."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastssl.config import RunConfig

# Automatic interval: this many times what the last save took, so that saves cost at most 1% of the run.
INTERVAL_PER_COST = 100
MAX_INTERVAL_S = 30 * 60.0
# Before any save was measured: the end of the first epoch, or after this time in a longer one.
FIRST_INTERVAL_S = 10 * 60.0
# An epoch that ends within a quarter of an interval is waited for: a checkpoint there has no epoch half done.
MID_EPOCH_FACTOR = 1.25


class CheckpointRule:
    """Decides after each step; `is_due_at` is the same on all ranks, `is_due_by_clock` is the first rank's to ask."""

    def __init__(
        self, cfg: RunConfig, *, steps_per_epoch: int, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock.

        Args:
            cfg: Has the `checkpoint_every_*` and `keep_every_epochs`.
            steps_per_epoch: Optimizer steps.
            total_steps: Of the whole run.
            clock: Seconds.
        """
        self._cfg, self._clock = cfg, clock
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._uses_clock = not cfg.checkpoint_every_steps and cfg.checkpoint_every_epochs is None
        self._last_save_s = clock()
        self._cost_s: float | None = None  # of the last save

    def is_due_at(self, step: int) -> bool:
        """Whether this step (1-based, done) must have a checkpoint whatever the clock says."""
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        by_epochs = (self._cfg.checkpoint_every_epochs, self._cfg.keep_every_epochs)
        at_epoch_end = step_in_epoch == 0 and any(every and epoch % every == 0 for every in by_epochs)
        every = self._cfg.checkpoint_every_steps
        return step == self._total_steps or at_epoch_end or bool(every and step % every == 0)

    def is_due_by_clock(self, step: int) -> bool:
        """Whether the interval has passed by this step; ranks that ask get different answers."""
        if not self._uses_clock:
            return False
        at_epoch_end_s, mid_epoch_s = self._intervals_s()
        limit_s = mid_epoch_s if step % self._steps_per_epoch else at_epoch_end_s
        return self._clock() - self._last_save_s >= limit_s

    @contextmanager
    def measured_save(self) -> Iterator[None]:
        """Measures a save, from whose end the next interval is counted."""
        began_s = self._clock()
        yield
        self._last_save_s = self._clock()
        self._cost_s = self._last_save_s - began_s

    def _intervals_s(self) -> tuple[float, float]:
        """From the last save to the next one: at the end of an epoch, and in mid-epoch."""
        if self._cfg.checkpoint_every_minutes:
            interval_s = 60 * self._cfg.checkpoint_every_minutes
            return interval_s, MID_EPOCH_FACTOR * interval_s
        if self._cost_s is None:
            return 0.0, FIRST_INTERVAL_S
        interval_s = min(INTERVAL_PER_COST * self._cost_s, MAX_INTERVAL_S)
        return interval_s, min(MID_EPOCH_FACTOR * interval_s, MAX_INTERVAL_S)
