"""A cluster's request to leave: SIGTERM and SIGUSR1 end a training at its next step, with a checkpoint.

SLURM sends what `--signal` names before the time limit, Kubernetes SIGTERM before it kills. A second signal of the same
kind does what it does by default.
"""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that a signal asked this process to leave.

    Attributes:
        name: Of the signal, such as "SIGTERM"; None: nobody asked.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in _SIGNALS:
                signal.signal(number, self._remember)

    def close(self) -> None:
        """Give the signals their default meaning back."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
