"""The error for bad files and bad data."""

from pipelines.printable import printable


class DataError(ValueError):
    """Raised for a file or a sample that cannot be used; the message is one line that names it and a remedy."""

    def __init__(self, message: str) -> None:
        """Messages contain names from outside: control characters are escaped, see `printable`."""
        super().__init__(printable(message))


class DataChangedError(DataError):
    """Raised when an open file is found to have been changed in place or cut short."""


def one_line(error: BaseException) -> str:
    """Message of a library's exception in one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
