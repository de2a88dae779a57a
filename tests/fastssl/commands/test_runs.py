"""`fastssl runs`: what it says of runs in every state, from files alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.cli import main
from fastssl.commands.runs.list_runs import list_runs
from fastssl.errors import UserError
from tests.helpers.runs import make_run


def found(folder: Path) -> dict[str, dict]:
    return {Path(row["run"]).name: row for row in list_runs(folder).values["rows"]}


def test_states(tmp_path):
    make_run(tmp_path / "finished", epochs_done=3)
    make_run(tmp_path / "stopped").preempted.write_text("goes on after step 10 with --set run.resume=auto\n")
    make_run(tmp_path / "crashed").lock_file.write_text(f"process 4194399 on {os.uname().nodename} (0123456789abcdef)")
    make_run(tmp_path / "running").lock()  # by this process
    make_run(tmp_path / "elsewhere").lock_file.write_text("process 1 on another-host (0123456789abcdef)")
    unsaved = make_run(tmp_path / "unsaved", epochs_done=3)
    (unsaved.checkpoints / "step_00000030").rename(unsaved.checkpoints / "step_00000020")
    reused = make_run(tmp_path / "reused")  # the number of a process that died is this process's
    reused.lock_file.write_text(f"process {os.getpid()} on {os.uname().nodename} (0123456789abcdef)")
    os.utime(reused.lock_file, (0, 0))
    states = {name: row["state"] for name, row in found(tmp_path).items()}
    assert states == {
        "finished": "finished", "stopped": "stopped", "crashed": "crashed", "running": "running",
        "elsewhere": "running", "unsaved": "crashed", "reused": "crashed",
    }  # fmt: skip
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "elsewhere" / "metrics.jsonl", (hour_ago, hour_ago))
    assert found(tmp_path)["elsewhere"]["state"] == "crashed"


def test_accuracies_are_of_the_best_measure_that_there_is(tmp_path):
    make_run(tmp_path / "probe", epochs_done=2)
    make_run(tmp_path / "knn", epochs_done=3, held_out=(0.5, 0.7, 0.6), loss={"name": "byol"})
    make_run(tmp_path / "new", epochs_done=0)
    rows = found(tmp_path)
    keys = ("measure", "last_top1", "best_top1", "num_epochs_done", "num_epochs")
    assert [rows["probe"][key] for key in keys] == ["probe", 0.26, 0.26, 2, 3]
    assert [rows["knn"][key] for key in keys] == ["kNN", 0.6, 0.7, 3, 3]
    assert [rows["new"][key] for key in keys] == [None, None, None, 0, 3]
    assert (rows["probe"]["loss"], rows["knn"]["loss"]) == ("mio exp", "byol")
    assert 0 <= rows["knn"]["time_s"] < 60
    table = list_runs(tmp_path).text()
    assert "60.0%" in table
    assert "70.0%" in table


def test_other_folders_are_skipped_with_their_reason_and_nothing_is_written(tmp_path, capfd):
    runs = tmp_path / "runs"
    make_run(runs / "study" / "mio" / "seed_0")  # as compare leaves them
    (runs / "notes").mkdir()
    for name, text in (("foreign", "a: 1\n"), ("broken", "{"), ("list", "[1]"), ("\x1b[2J", "x")):
        (runs / name).mkdir()
        (runs / name / "config.yaml").write_text(text)
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "config.yaml")
    make_run(runs / "cut").metrics.write_text('{"kind": "epoch", "step": 10, "epoch": 0}\n{"kind": "ep')
    before = {path: path.lstat().st_mtime_ns for path in runs.rglob("*")}
    assert main(["runs", str(runs), "--json"]) == 0
    out, err = capfd.readouterr()
    rows = json.loads(out)["rows"]
    assert [Path(row["run"]).relative_to(runs) for row in rows] == [Path("cut"), Path("study/mio/seed_0")]
    assert rows[0]["num_epochs_done"] == 1
    lines = err.strip().split("\n")
    assert len(lines) == 6
    assert all(line.startswith("fastssl runs: ") and " is skipped: " in line and line.isprintable() for line in lines)
    assert {path: path.lstat().st_mtime_ns for path in runs.rglob("*")} == before


def test_a_run_alone_no_runs_and_no_folder(tmp_path, capfd):
    make_run(tmp_path / "a")
    assert list(found(tmp_path / "a")) == ["a"]
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no runs in" in capfd.readouterr().out
    with pytest.raises(UserError, match="not a folder"):
        list_runs(tmp_path / "none")


def test_a_lock_is_neither_taken_nor_imported_torch(tmp_path):
    make_run(tmp_path / "a")
    code = (
        "import sys, fcntl; fcntl.flock = None; from fastssl.cli import main\n"
        f"assert main(['runs', {str(tmp_path)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
