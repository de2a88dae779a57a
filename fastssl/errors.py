"""The errors that end a command with one line."""


class UserError(ValueError):
    """Something that the user must mend: the message is one line that names it and says what to do (exit code 2)."""


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key."""


class DivergedError(RuntimeError):
    """The loss is no longer finite, or the representation has collapsed (exit code 3)."""


class Preempted(Exception):
    """A signal asked the training to leave, and its checkpoint is written; the message says how it goes on."""
