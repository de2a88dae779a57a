"""The error for bad files and bad data."""


class DataError(ValueError):
    """Raised for a file or a sample that cannot be used; the message is one line that names it and a remedy."""
