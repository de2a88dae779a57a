"""Progress of a long job: a progress bar on a terminal, otherwise an occasional line."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self, TextIO

from pipelines.printable import printable

FIRST_LINE_S = 5.0
LINE_EVERY_S = 10.0  # from 100 s on, a tenth of the time so far: an hour has about fifty lines
_TICK_S = 1.0


class Lines:
    """Says when the next line of a job is due where nobody watches."""

    def __init__(self) -> None:
        self._started_s = self._printed_s = time.monotonic()
        self._gap_s = min(FIRST_LINE_S, LINE_EVERY_S)

    def are_due(self) -> bool:
        """Whether to print a line; if so, it counts as printed."""
        is_due = time.monotonic() - self._printed_s >= self._gap_s
        if is_due:
            self.printed()
        return is_due

    def printed(self) -> None:
        """Count a line that is printed anyway."""
        self._printed_s = time.monotonic()
        self._gap_s = LINE_EVERY_S * max(1.0, self.elapsed_s / 100)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the job's start."""
        return time.monotonic() - self._started_s


class Progress:
    """Counts images or bytes; a context manager. Rates and the remaining time are based on this process's own work."""

    def __init__(
        self,
        what: str,
        num_total: int,
        num_before: int = 0,
        unit: Literal["img", "B"] = "img",
        *,
        file: TextIO | None = None,
        leave: bool = True,
    ) -> None:
        """Set the size of the job.

        Args:
            what: Name of the job, at the start of the line.
            num_total: Number of images, or bytes, of the whole job.
            num_before: Number already done by an earlier process.
            unit: The unit that is counted.
            file: Where lines are printed; None: stdout.
            leave: Whether the bar stays on the terminal when the job is done.
        """
        self._what, self._unit = printable(what), unit
        self._num_total = num_total
        self._num_before = self._num_done = num_before
        self._file, self._leave = file, leave

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=self._what,
            total=self._num_total,
            initial=self._num_before,
            unit=f" {self._unit}",
            unit_scale=self._unit == "B",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=self._leave,
        )
        self._lines = Lines()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, num: int = 1) -> None:
        """Count `num` more."""
        self._num_done += num
        self._bar.update(num)
        if self._bar.disable and self._lines.are_due():
            print(self._line(self._lines.elapsed_s), file=self._file, flush=True)

    def extend(self, num: int) -> None:
        """The job is larger than was known by `num`, or smaller where it is negative."""
        self._num_total += num
        self._bar.total = self._num_total

    @contextmanager
    def during(self, num: int, expected_s: float) -> Iterator[None]:
        """Count `num` more while the code inside runs, which cannot count itself and takes about `expected_s`.

        If it takes longer, the count stops short of `num` until it is done.
        """
        counted, is_done, started_s = 0, threading.Event(), time.monotonic()

        def count() -> None:
            nonlocal counted
            while not is_done.wait(_TICK_S):
                fraction = (time.monotonic() - started_s) / max(expected_s, 1e-9)
                due = int(num * min(fraction, 0.99))
                self.advance(due - counted)
                counted = due

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()
            self.advance(num - counted)

    def _line(self, elapsed_s: float) -> str:
        per_s = (self._num_done - self._num_before) / max(elapsed_s, 1e-9)
        left = timedelta(seconds=round((self._num_total - self._num_done) / per_s)) if per_s else "unknown"
        return f"{self._what}  {self._num_done:,}/{self._num_total:,}  {per_s:,.0f} {self._unit}/s  left {left}"
