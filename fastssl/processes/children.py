"""Programs that are started by this one: signals that ask it to end reach them too."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ASKS_TO_END = (signal.SIGTERM, signal.SIGUSR1)


def launch_command(num_processes: int, program: Sequence[str]) -> list[str]:
    """The command that starts a Python program in one process, or in several of this machine."""
    if num_processes == 1:
        return [sys.executable, *program]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [sys.executable, *launcher, *program]


class Child:
    """A program that is started in a `signals_passed_on` block."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[Any] | None = None
        self._is_asked = False

    def start(self, command: list[str], **options: Any) -> "subprocess.Popen[Any]":
        """`subprocess.Popen`; a signal that came before is passed on at once."""
        self._process = subprocess.Popen(command, **options)
        if self._is_asked:
            self._process.send_signal(signal.SIGTERM)
        return self._process

    def ask_to_end(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self._is_asked = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


@contextmanager
def signals_passed_on() -> Iterator[Child]:
    """Pass SIGTERM and SIGUSR1 on to the program, both as SIGTERM.

    torchrun and deepspeed pass SIGTERM on to their processes, and die of SIGUSR1. A terminal sends SIGINT to all of its
    processes itself, so this one waits for the program's end.
    """
    child = Child()
    numbers = (*_ASKS_TO_END, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in _ASKS_TO_END:
        signal.signal(number, child.ask_to_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
