"""Error messages of processes that share a terminal or a log."""

import io

import pytest

from fastssl.errors import print_error


class Unbuffered(io.StringIO):
    """A text stream that keeps each write, as `python -u` passes each on to the file at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


@pytest.mark.parametrize(("world_size", "where"), [("1", ""), ("2", " (rank 1)")])
def test_an_error_is_one_line_in_one_write(monkeypatch, world_size, where) -> None:
    stream = Unbuffered()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("RANK", "1")
    print_error("two\n lines\x1b")
    assert stream.writes == [f"fastssl: error{where}: two lines\\x1b\n"]
