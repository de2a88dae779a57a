"""Real trainings with real trackers: killed and resumed, it is one whole run in each, and the training is the same."""

import os
import time

import pytest

from fastssl.tracking.json_lines import read_rows
from tests.helpers.processes import start_training
from tests.helpers.runs import assert_same_end
from tests.helpers.tracked import mlflow_run, rows_of_file, rows_of_mlflow, rows_of_wandb

TRACKERS = "run.trackers=[wandb,mlflow]"


@pytest.fixture(autouse=True)
def only_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_is_one_whole_run_in_each_tracker(num_ranks, tiny_config, tmp_path):
    """Killed after a checkpoint in mid-epoch, when the trackers have rows of later steps; 1 or 2 ranks."""
    settings = ["run.checkpoint_every_epochs=null", "run.checkpoint_every_steps=6", "run.resume=auto"]
    settings += ["train.num_epochs=6", "data.global_batch_size=256"]
    arguments = ["--cfg", str(tiny_config), "--set", *settings]
    plain, run, log = tmp_path / "plain", tmp_path / "run", tmp_path / "log.txt"
    log.touch()

    def start(*more: str):
        return start_training([*arguments, *more], num_ranks=num_ranks, log=log)

    def end(ranks) -> None:
        for rank in ranks:
            rank.join(240)
        assert [rank.exitcode for rank in ranks] == [0] * num_ranks, log.read_text()

    end(start(f"run.dir={plain}"))
    ranks = start(f"run.dir={run}", TRACKERS)
    wait_for(lambda: any(row["step"] >= 9 for row in read_rows(run / "metrics.jsonl", "step")), log)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert (run / "checkpoints/step_00000006").is_dir()
    end(start(f"run.dir={run}", TRACKERS))
    assert_same_end(plain, run)
    assert "warning" not in log.read_text()
    rows = rows_of_file(run)
    assert rows["step/loss"].keys() == set(range(1, 31))
    assert rows_of_wandb(run) == rows
    tracked = rows_of_mlflow(run)
    assert {name: values.keys() for name, values in tracked.items()} == {name: rows[name].keys() for name in rows}
    assert tracked["step/loss"] == rows["step/loss"]  # of a step that was repeated, MLflow keeps the first times


@pytest.mark.slow
def test_a_resumed_run_may_add_a_tracker(tiny_config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    for more in ([], ["run.trackers=[mlflow]", "run.resume=auto"]):
        (rank,) = start_training(["--cfg", str(tiny_config), "--set", f"run.dir={run}", *more], num_ranks=1, log=log)
        rank.join(240)
        assert rank.exitcode == 0, log.read_text()
    assert rows_of_mlflow(run) == rows_of_file(run)


@pytest.mark.slow
def test_a_run_that_a_signal_ended_goes_on_in_its_trackers(tiny_config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = ["--cfg", str(tiny_config), "--set", f"run.dir={run}", TRACKERS, "train.num_epochs=4"]
    (rank,) = start_training(arguments, num_ranks=1, log=log)
    wait_for(lambda: any(row["step"] >= 3 for row in read_rows(run / "metrics.jsonl", "step")), log)
    rank.terminate()
    rank.join(60)
    assert rank.exitcode == 0
    assert (run / "preempted").exists()
    num_done = max(rows_of_file(run)["step/loss"])
    assert num_done < 40
    assert rows_of_wandb(run) == rows_of_mlflow(run) == rows_of_file(run)
    assert mlflow_run(run).info.status == "KILLED"
    (rank,) = start_training([*arguments, "run.resume=auto"], num_ranks=1, log=log)
    rank.join(240)
    assert rank.exitcode == 0
    assert rows_of_file(run)["step/loss"].keys() == set(range(1, 41))
    assert rows_of_wandb(run) == rows_of_mlflow(run) == rows_of_file(run)
    assert mlflow_run(run).info.status == "FINISHED"
    assert "warning" not in log.read_text()


def wait_for(is_there, log) -> None:
    until = time.monotonic() + 120
    while not is_there():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)
