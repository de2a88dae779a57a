"""The errors that end a command with one line."""

import os
import sys


class UserError(ValueError):
    """Something that the user must mend: the message is one line that names it and says what to do (exit code 2)."""


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key."""


class DivergedError(RuntimeError):
    """The loss is no longer finite, or the representation has collapsed (exit code 3)."""


class Preempted(Exception):
    """A signal asked the training to leave, and its checkpoint is written; the message says how it goes on."""


class PeerLostError(RuntimeError):
    """Another process of the run does not come, has died, hangs or cannot be reached any more."""

    exit_code = 4


def print_error(message: str) -> None:
    """Say on stderr, in one line, why this process ends."""
    rank = os.environ.get("RANK", "0")
    where = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (rank {rank})"
    print(f"fastssl: error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
