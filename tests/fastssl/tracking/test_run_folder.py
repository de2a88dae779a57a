"""A run's folder is one training's at a time, and a resumed run the same but for what is free."""

import subprocess
import sys

import pytest
from torch import nn

from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.machine.files import replace_text
from fastssl.models.sync_batch_norm import has_batch_norm
from fastssl.tracking.run_folder import RunFolder, run_above

OTHER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7 on elsewhere", end="", file=file, flush=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_against_others_until_its_training_is_killed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.read_lock() is None
    folder.path.mkdir()
    other = subprocess.Popen([sys.executable, "-c", OTHER, folder.lock_file], stdout=subprocess.PIPE, text=True)
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="run is in use by process 7 on elsewhere: wait"):
        folder.lock()
    other.kill()
    other.wait()
    mark = folder.lock()
    assert folder.read_lock() == mark


def test_a_training_after_another_in_one_process_has_a_mark_of_its_own(tmp_path):
    first, second = RunFolder(tmp_path).lock(), RunFolder(tmp_path).lock()
    assert first != second
    assert RunFolder(tmp_path).read_lock() == second


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/run cannot be written"):
        RunFolder(tmp_path / "file/run").lock()


def test_text_is_replaced_as_a_whole(tmp_path):
    replace_text(tmp_path / "a", "old")
    replace_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def config(**train):
    return build_config({"run": {"resume": "auto"}, "train": train})


def test_a_run_goes_on_with_its_optimizer_on_the_cpu_and_back(tmp_path):
    folder, here, offloaded = RunFolder(tmp_path / "run"), config(), config(zero_stage=1, offload_optimizer=True)
    folder.create(here, world_size=1)
    assert folder.check_claim(offloaded)
    folder.create(offloaded, world_size=1)
    assert folder.check_claim(here)


def test_what_changes_the_training_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(config(), world_size=1)
    with pytest.raises(ConfigError, match=r"was started with a different configuration: train.precision: fp32 -> bf16"):
        folder.check_claim(config(precision="bf16"))


def test_a_batch_is_cut_into_other_parts_only_without_batch_norm(tmp_path):
    folder, parts = RunFolder(tmp_path / "run"), config(num_micro_batches=4)
    folder.create(config(), world_size=1)
    assert folder.check_claim(parts)
    assert not has_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    assert has_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folder.check_micro_batches(config())
    with pytest.raises(ConfigError, match=r"train.num_micro_batches: .* was started with 1, not 4") as error:
        folder.check_micro_batches(parts)
    assert "\n" not in str(error.value)


def test_a_path_of_a_run_leads_to_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    weights = run / "checkpoints" / "step_00000001" / "weights.pt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (run / "config.yaml").touch()
    for path in (run, weights.parent, weights):
        found = run_above(path)
        assert found is not None
        assert found.path == run
    monkeypatch.chdir(weights.parent)
    assert run_above("weights.pt") is not None
    assert run_above(weights / "deeper") is None
    assert run_above(tmp_path) is None
