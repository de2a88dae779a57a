"""Progress of a long job: a progress bar on a terminal, otherwise an occasional line."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self, TextIO

from pipelines.printable import printable

LINE_EVERY_S = 10.0


class Progress:
    """Counts images or bytes; a context manager. Rates and the remaining time are based on this process's own work."""

    def __init__(
        self,
        what: str,
        num_total: int,
        num_before: int = 0,
        unit: Literal["img", "B"] = "img",
        stream: TextIO | None = None,
    ) -> None:
        """Set the size of the job.

        Args:
            what: Name of the job, at the start of the line.
            num_total: Number of images, or bytes, of the whole job.
            num_before: Number already done by an earlier process.
            unit: The unit that is counted.
            stream: Where the occasional lines go; None: stdout.
        """
        self._stream = stream
        self._what, self._unit = printable(what), unit
        self._num_total = num_total
        self._num_before = self._num_done = num_before

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
        )
        self._started_s = self._printed_s = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, num: int = 1) -> None:
        """Count `num` more."""
        self._num_done += num
        self._bar.update(num)
        now_s = time.monotonic()
        if self._bar.disable and now_s - self._printed_s >= LINE_EVERY_S:
            self._printed_s = now_s
            print(self._line(now_s - self._started_s), file=self._stream, flush=True)

    def _line(self, elapsed_s: float) -> str:
        per_s = (self._num_done - self._num_before) / max(elapsed_s, 1e-9)
        left = timedelta(seconds=round((self._num_total - self._num_done) / max(per_s, 1e-9)))
        return f"{self._what}  {self._num_done:,}/{self._num_total:,}  {per_s:,.0f} {self._unit}/s  left {left}"
