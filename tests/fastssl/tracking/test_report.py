"""What a command prints: within a width, with nothing lost, and the same as JSON."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastssl.tracking.report import Report, to_json
from fastssl.tracking.result_rows import fit_table, rounded

ROWS = [
    {"run": "runs/photographs_of_flowers/seed_0", "top1": 71.5, "low": 70.0, "settings": "k=20 temperature=0.07"},
    {"run": "runs/b", "top1": None, "low": 8.0, "settings": ""},
]
COLUMNS = {"run": "run", "top1": "top-1 in %", "low": "low", "settings": "settings"}
DETAILS = ("low", "settings")


def report(**changes) -> Report:
    return Report(values={}, rows=ROWS, columns=COLUMNS, details=DETAILS, **changes)


def test_all_columns_where_the_width_does_not_matter():
    lines = report(head="head", foot="foot").text().split("\n")
    assert lines[0] == "head"
    assert lines[1].split() == ["run", "top-1", "in", "%", "low", "settings"]
    assert lines[2].split() == ["runs/photographs_of_flowers/seed_0", "71.5", "70.0", "k=20", "temperature=0.07"]
    assert lines[3].split() == ["runs/b", "-", "8.0"]
    assert lines[4:] == ["foot"]


@pytest.mark.parametrize("max_chars", [30, 40, 47, 51, 60, 73, 74, 75])
def test_no_line_is_longer_than_the_terminal_and_what_is_missing_is_named(max_chars):
    table, missing = fit_table(ROWS, COLUMNS, DETAILS, max_chars)
    lines = table.split("\n")
    assert max(map(len, lines)) <= max_chars
    assert "71.5" in lines[1]
    for heading in ("low", "settings"):
        assert (heading in lines[0]) != (heading in missing)
    is_whole = "runs/photographs_of_flowers/seed_0" in table
    assert is_whole != ("shortened" in missing)
    if not is_whole:
        assert lines[1].startswith("runs/")
        assert "…" in lines[1]
        assert "seed_0  " in lines[1]  # cut in the middle: the ends tell runs apart
    assert missing.endswith("(--wide shows all)") or not missing


def test_the_details_leave_from_the_last():
    assert fit_table(ROWS, COLUMNS, DETAILS, 75) == fit_table(ROWS, COLUMNS)
    assert "not shown: settings" in fit_table(ROWS, COLUMNS, DETAILS, 60)[1]
    assert "not shown: low, settings" in fit_table(ROWS, COLUMNS, DETAILS, 47)[1]


def test_numbers_are_never_shortened():
    rows = [{"x": 123456789.25, "y": 1}]
    assert fit_table(rows, {"x": "x", "y": "y"}, (), 4) == ("           x  y\n123456789.25  1", "")


def test_prose_is_wrapped_and_paths_stay_whole():
    path = "/a/" + "b" * 70
    text = report(head="word " * 20, foot=path).text(50)
    lines = text.split("\n")
    assert path in lines
    assert all(len(line) <= 50 for line in lines if line != path)


def test_what_a_terminal_would_obey_is_escaped():
    text = Report(values={}, rows=[{"a": "\x1b[2J"}], columns={"a": "a"}, head="\x1b]0;x").text(80)
    assert "\x1b" not in text


def test_json_has_only_what_json_knows():
    values = {"nan": float("nan"), "inf": [np.float32("inf")], "path": Path("a"), "array": np.arange(2), 3: (0.1, True)}
    found = json.loads(to_json(values))
    assert found == {"nan": None, "inf": [None], "path": "a", "array": [0, 1], "3": [0.1, True]}


def test_rounded_to_significant_digits():
    assert rounded({"a": 1234.567, "b": 3, "c": None, "d": "x"}, 4) == {"a": 1235.0, "b": 3, "c": None, "d": "x"}
