"""Progress: a line now and then where nobody watches, a bar on a terminal."""

import re
import sys
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


def test_lines_go_where_they_are_asked_to(capsys):
    with Progress("x", 10, file=sys.stderr) as bar:
        bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("x  1/10  ")


def test_a_job_may_grow(capsys):
    with Progress("x", 10) as bar:
        bar.extend(10)
        bar.extend(-5)
        bar.advance(3)
    assert capsys.readouterr().out.startswith("x  3/15  ")


def test_what_cannot_count_itself_is_counted_by_its_time(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_TICK_S", 0.01)
    with Progress("x", 1000) as bar:
        with bar.during(100, expected_s=0.1):
            time.sleep(0.3)  # three times as long as expected
        bar.advance()
    counts = [int(count) for count in re.findall(r"^x  (\d+)/1,000", capsys.readouterr().out, re.MULTILINE)]
    assert counts == sorted(counts)
    assert 99 in counts
    assert counts[-2:] == [100, 101]


def test_lines_become_rarer(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(progress, "LINE_EVERY_S", 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    lines, due = progress.Lines(), []
    for now_s in range(3600):
        if lines.are_due():
            due.append(now_s)
    assert due[:4] == [5, 15, 25, 35]
    assert 30 < len(due) < 60
