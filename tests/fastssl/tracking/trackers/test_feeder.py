"""Rows on their way from metrics.jsonl to real trackers, each in its process; nothing leaves this machine."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from fastssl.tracking.json_lines import drop_rows_after
from fastssl.tracking.trackers import feeder
from fastssl.tracking.trackers.feeder import Feeder
from tests.helpers.tracked import (
    append_rows,
    mlflow_run,
    rows_of_file,
    rows_of_mlflow,
    rows_of_wandb,
    wandb_records,
    write_run,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return write_run(tmp_path / "run")


def wait_for(is_there) -> None:
    until = time.monotonic() + 60
    while not is_there():
        assert time.monotonic() < until
        time.sleep(0.05)


def kill(feeding: Feeder) -> None:
    """As a machine that goes down does."""
    for process in feeding.processes.values():
        process.kill()
        process.wait()


def test_a_resumed_run_is_whole_in_each_tracker(run: Path):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    append_rows(run, 1, 6)
    feeding = Feeder(run, run / "trackers", ["wandb", "mlflow"])
    metrics = run / "trackers/mlflow"
    wait_for(lambda: any(metrics.glob("*/*/metrics/epoch/rankme")))
    wait_for(lambda: any((run / "trackers/wandb").glob("offline-run-*/*.wandb")))
    kill(feeding)

    drop_rows_after(run / "metrics.jsonl", 4)
    resumed = Feeder(run, run / "trackers", ["wandb", "mlflow"])
    append_rows(run, 5, 9)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('not a row\n{"step": 10, "lo')
    resumed.close("finished")
    rows = rows_of_file(run)
    assert rows["step/loss"].keys() == set(range(1, 10))
    assert rows["epoch/rankme"].keys() == {2, 4, 6, 8}
    assert rows_of_wandb(run) == rows
    assert rows_of_mlflow(run) == rows

    told = mlflow_run(run)
    assert told.info.status == "FINISHED"
    assert told.data.params == {"run.dir": "x", "loss.name": "mio", "views.specs": '[{"a": 1}]', "ds": "{}"}
    assert told.data.tags["packages.torch"] == "2"
    config = {
        item.key: json.loads(item.value_json)
        for record in wandb_records(run)
        for item in [*record.run.config.update, *record.config.update]
    }
    assert config["loss"] == {"name": "mio"}
    assert config["environment"] == {"packages": {"torch": "2"}}
    assert not list(Path.cwd().iterdir())


def test_a_tracker_that_fails_in_mid_run_is_one_warning(run: Path, capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("mlflow")
    append_rows(run, 1, 4)
    feeding = Feeder(run, run / "trackers", ["mlflow"])
    store = run / "trackers/mlflow"
    wait_for(lambda: any(store.glob("*/*/metrics/epoch/rankme")))
    shutil.rmtree(store)
    append_rows(run, 5, 6)
    wait_for(lambda: feeding.processes["mlflow"].poll() is not None)
    append_rows(run, 7, 8)
    feeding.close("finished")
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"fastssl: warning: mlflow gets no more rows \(.+\); the training and .+jsonl go on", line)


def test_a_server_that_is_not_there_is_one_warning_without_secrets(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden-1@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hidden-2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    append_rows(run, 1, 2)
    Feeder(run, run / "trackers", ["mlflow"]).close("finished")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fastssl: warning: mlflow gets no more rows (")
    assert "127.0.0.1" in line
    assert "hidden" not in line
    assert not [path for path in run.rglob("*") if path.is_file() and b"hidden" in path.read_bytes()]


def test_a_tracker_that_hangs_is_left(run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(feeder.WAIT_S, "finished", 0.2)
    feeding = Feeder(run, run / "trackers", ["mlflow"])
    process = feeding.processes["mlflow"]
    process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    append_rows(run, 1, 100)
    feeding.close("finished")
    assert time.monotonic() - begun < 10
    assert process.poll() == -signal.SIGKILL
    assert "mlflow did not take its rows within 0 s" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_a_warning(run: Path, capfd: pytest.CaptureFixture[str]):
    (run / "trackers").write_text("")
    Feeder(run, run / "trackers", ["mlflow"]).close("finished")
    assert "mlflow gets no rows (File exists)" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("preempted", "KILLED"), (None, "FAILED")])
def test_mlflow_knows_how_a_training_ended(run: Path, end, status):
    """None: the training says nothing, since it failed."""
    pytest.importorskip("mlflow")
    append_rows(run, 1, 4)
    feeding = Feeder(run, run / "trackers", ["mlflow"])
    process = feeding.processes["mlflow"]
    if end is None:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    else:
        feeding.close(end)
    assert mlflow_run(run).info.status == status
    assert rows_of_mlflow(run) == rows_of_file(run)
