"""The error for bad files and bad data, and parts of messages."""

import difflib
from collections.abc import Iterable

from pipelines.printable import printable


class DataError(ValueError):
    """Raised for a file or a sample that cannot be used; the message is one line that names it and a remedy."""

    def __init__(self, message: str) -> None:
        """Messages contain names from outside: control characters are escaped, see `printable`."""
        super().__init__(printable(message))


class SourceChangedError(DataError):
    """What a conversion has written is of another source, of other options, or of the source before it changed."""


class DataChangedError(DataError):
    """Raised when an open file is found to have been changed in place or cut short."""


def one_line(error: BaseException) -> str:
    """Message of a library's exception in one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known names as the end of a message; empty if there are none."""
    near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""
