import json
import os
import re

import pytest

from fastssl.errors import ConfigError
from fastssl.tracking.json_lines import drop_rows_after, read_rows
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import MetricsWriter, StepTimer, training_time
from pipelines import progress


def test_rows_after_the_checkpoint_are_dropped_and_a_cut_off_line_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5, 6, 7]
    drop_rows_after(path, 5)
    assert path.read_text() == "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))


def test_lines_that_are_no_rows_are_skipped_named_and_kept(tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    bad = [
        b"[1, 2]",
        b'{"loss": 1}',
        b"\xff\xfe\0",
        b"[" * 100_000,
        b'{"step": "3"}',
        b'{"step": ' + b"9" * 5000 + b"}",
    ]
    rows = [json.dumps({"step": step}).encode() for step in range(1, 8)]
    lines = [line for pair in zip(rows, bad, strict=False) for line in pair] + rows[6:]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [row["step"] for row in read_rows(path, "step")] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in read_rows(path, "step")] == [1, 2, 3, 4, 5, 6, 7]
    warning = f"fastssl: warning: {path}: skipped what is not a row: lines 2, 4, 6, 8, 10 and 1 more\n"
    assert capfd.readouterr().err == warning  # once
    drop_rows_after(path, 3)
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:6] + bad[3:])


def test_no_file_has_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_rows_after(path, 0)
    assert read_rows(path) == []


def test_timer_tells_waiting_from_working(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_s)

    def slow_batches():
        nonlocal now_s
        for _ in range(4):
            now_s += 0.03
            yield None

    timer = StepTimer()
    timer.start()
    for _ in timer.waiting(slow_batches(), 10):
        now_s += 0.01
    expected = {"img_per_s": 40 / 0.16, "data_wait_fraction": 0.75}
    assert timer.read("step") == timer.read("epoch") == expected
    assert timer.read("step")["img_per_s"] == 0  # nothing since


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_one_line(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read .not a regular file"):
        read_rows(tmp_path / "metrics.jsonl", "step")


def test_the_time_of_a_training_is_that_of_its_epochs(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert training_time(path, 64) is None
    rows = [
        {"step": 5, "epoch": 0, "img_per_s": 1.0},  # of a step
        {"kind": "epoch", "step": 10, "epoch": 0, "img_per_s": 320.0},
        {"kind": "held_out", "step": 10, "epoch": 0, "knn_top1": 0.5},
        {"kind": "epoch", "step": 20, "epoch": 1, "img_per_s": 640.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_time(path, 64) == (2.0 + 1.0, 1280)


def test_a_long_epoch_says_how_far_it_is_where_nobody_watches(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    writer = MetricsWriter(RunFolder(tmp_path), start_step=3, steps_per_epoch=4, num_epochs=2)
    for _ in range(5):
        writer.advance()
    writer.close()
    out = capsys.readouterr().out
    # Step 4, which ends the epoch, has a line of its own with the loss.
    assert re.findall(r"(epoch \d/2  step \d/4)  left \d:\d\d:\d\d\n", out) == [
        "epoch 2/2  step 1/4",
        "epoch 2/2  step 2/4",
        "epoch 2/2  step 3/4",
    ]
