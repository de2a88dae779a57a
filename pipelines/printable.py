"""Text from outside (names of files, archive members and classes) in a form that is safe to print."""

MAX_CHARS = 1000


def printable(text: object, max_chars: int = MAX_CHARS) -> str:
    r"""Escape what a terminal would obey, and cut what is too long.

    A name may hold escape sequences, line breaks that forge lines of a report, marks that reverse the direction of
    writing, or bytes that are not UTF-8 (lone surrogates in Python). They become `\x1b`, `\n`, `\u202e`, `\udcff`.

    Args:
        text: Any object; its `str` is used.
        max_chars: Largest length of the result, > 1; of a longer text, the middle is replaced by "…".
    Returns:
        One line without control characters. Applying the function twice changes nothing.
    """
    text = _cut(str(text), max_chars)
    if text.isprintable():
        return text
    escaped = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return _cut("".join(escaped), max_chars)


def printable_lines(text: str) -> str:
    """`printable` for each line of a longer text, whose line breaks (only `\\n`) are its own."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    num_last = (max_chars - 1) // 2
    return f"{text[: max_chars - 1 - num_last]}…{text[len(text) - num_last :]}"
