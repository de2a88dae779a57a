"""The errors that end a command with a one-line message."""

import os
import sys

from pipelines.printable import printable


class UserError(ValueError):
    """An error that the user must fix; the message is one line that names it and says what to do (exit code 2)."""


class ConfigError(UserError):
    """An invalid configuration; the message names the key."""


class DivergedError(RuntimeError):
    """The loss is no longer finite, or the representation has collapsed (exit code 3)."""


class Preempted(Exception):
    """A signal stopped the training after it saved a checkpoint; the message says how to resume."""


class PeerLostError(RuntimeError):
    """Another process of the run did not start, died, hangs or can no longer be reached (exit code 4)."""

    exit_code = 4


def print_error(message: str) -> None:
    """Print on stderr, in one line, why this process ends."""
    rank = os.environ.get("RANK", "0")
    where = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (rank {rank})"
    # One write: launchers start processes with `python -u`, where print() writes the line break apart from the text, so
    # that the lines of two processes would mix.
    sys.stderr.write(f"fastssl: error{where}: {printable(' '.join(message.split()))}\n")
    sys.stderr.flush()
