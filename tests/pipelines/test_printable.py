"""Names from outside cannot steer a terminal or forge lines."""

import pickle

import pytest

from pipelines.errors import DataError
from pipelines.printable import MAX_CHARS, printable, printable_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos/Größe 写真.jpg", "photos/Größe 写真.jpg"),
        ("\x1b[2J\x9b31mred", "\\x1b[2J\\x9b31mred"),
        ("a.jpg\tgood\nb.jpg\r", "a.jpg\\tgood\\nb.jpg\\r"),
        ("a\u2028b\x85", "a\\u2028b\\x85"),
        ("gpj\u202e.exe\u2066", "gpj\\u202e.exe\\u2066"),
        ("caf\udce9", "caf\\udce9"),
        ("\0\x7f", "\\x00\\x7f"),
    ],
)
def test_escapes(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected


def test_long_text_is_cut_in_the_middle():
    for text in ("a" + "x" * 10**6 + "z", "a" + "\x1b" * 10**6 + "z"):
        short = printable(text)
        assert len(short) == MAX_CHARS
        assert (short[0], short[-1]) == ("a", "z")
        assert "…" in short
        assert printable(short) == short
    assert printable("x" * MAX_CHARS) == "x" * MAX_CHARS


def test_lines_of_a_table_stay_lines():
    assert printable_lines("a\x1b\nb\u202e\n") == "a\\x1b\nb\\u202e\n"


def test_messages_of_errors_are_one_line():
    error = pickle.loads(pickle.dumps(DataError("x\ny: bad")))
    assert str(error) == "x\\ny: bad"
