"""The error for bad files and bad data."""


class DataError(ValueError):
    """A file or a sample that cannot be used; the message is one line that names it and says what to do."""
