"""A cluster's request to leave: SIGTERM and SIGUSR1 end a training at its next step, with a checkpoint.

SLURM sends what `--signal` names before the time limit, Kubernetes SIGTERM before it kills. A second signal of the same
kind does what it does by default. SIGUSR1 is remembered from the start of the process, SIGTERM once the training is
built: before, a launcher ends with it the processes whose peer has failed, and there is nothing to save.
"""

import signal
import threading
from types import FrameType


class StopRequest:
    """Remembers that a signal asked this process to leave.

    Attributes:
        name: Of the signal, such as "SIGTERM"; None: nobody asked.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._listen(signal.SIGUSR1)

    def listen_to_sigterm(self) -> None:
        """From now on SIGTERM is remembered too."""
        self._listen(signal.SIGTERM)

    def _listen(self, number: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
