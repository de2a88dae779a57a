"""A cluster's request to leave: SIGTERM and SIGUSR1 end a training at its next step, with a checkpoint.

SLURM sends what `--signal` names before the time limit, Kubernetes SIGTERM before it kills. Repeats are ignored: a
scheduler signals every process, and a launcher among them forwards it once more. SIGKILL ends a process at once.
SIGUSR1 is remembered from the start of the process, SIGTERM once the training is built: before, a launcher ends with it
the processes whose peer has failed, and there is nothing to save.
"""

import signal
import threading
from types import FrameType
from typing import Any, Self


class StopRequest:
    """Remembers that a signal asked this process to leave, until the end of a `with` block.

    Attributes:
        name: Name of the signal, such as "SIGTERM"; None: no signal has arrived.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._handlers_before: dict[signal.Signals, Any] = {}
        self._listen(signal.SIGUSR1)

    def listen_to_sigterm(self) -> None:
        """From now on, remember SIGTERM too."""
        self._listen(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous signal handlers."""
        while self._handlers_before:
            number, handler = self._handlers_before.popitem()
            signal.signal(number, handler)

    def _listen(self, number: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._handlers_before[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
