"""Progress: a line now and then where nobody watches, a bar on a terminal."""

import re
import time

import pytest

from pipelines import progress
from pipelines.progress import Progress


@pytest.fixture(autouse=True)
def every_line(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)


def test_lines_say_how_far_how_fast_and_how_long_still(capsys):
    with Progress("x.beton", 2000) as bar:
        time.sleep(0.05)
        bar.advance(500)
        bar.advance()
    first, second = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"x\.beton  500/2,000  ([\d,]+) img/s  left (\d+):(\d\d):(\d\d)", first)
    assert found
    assert 500 < int(found[1].replace(",", "")) <= 10_000
    assert second.startswith("x.beton  501/2,000  ")


def test_what_an_earlier_process_did_counts_as_done_but_not_as_speed(capsys):
    with Progress("x", 1000, num_before=900) as bar:
        time.sleep(0.1)
        bar.advance(10)
    found = re.match(r"x  910/1,000  ([\d,]+) img/s", capsys.readouterr().out)
    assert found
    assert int(found[1]) <= 100


def test_bytes(capsys):
    with Progress("x", 3_000_000, unit="B") as bar:
        bar.advance(1_000_000)
    assert re.match(r"x  1,000,000/3,000,000  [\d,]+ B/s  left ", capsys.readouterr().out)


def test_a_line_now_and_then_is_not_one_for_each(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 60.0)
    with Progress("x", 10) as bar:
        for _ in range(10):
            bar.advance()
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("x.beton", 10) as bar:
        for _ in range(10):
            bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "x.beton: 100%" in err
    assert "10/10" in err
