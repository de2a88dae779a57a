"""Real trainings whose data.train is changed while they run: what ends in one line, and what goes on."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from fastssl.checkpoint.checksums import read_manifest, save_file, write_manifest
from fastssl.checkpoint.save_load import last_checkpoint
from fastssl.tracking.writers import read_rows
from pipelines.beton import BetonReader
from tests.helpers.processes import start_training
from tests.helpers.runs import assert_same_end

NUM_STEPS = 40


class Training:
    """A training of 40 steps on a copy of the digits, in a process of its own."""

    def __init__(self, config: Path, digits: Path) -> None:
        self.data, self.run = config.parent / "train.beton", config.parent / "run"
        shutil.copy(digits / "train.beton", self.data)
        self._config, self._log, self._digits = config, config.parent / "log", digits

    def restore(self) -> None:
        """Put the first file there again."""
        shutil.copy(self._digits / "train.beton", self.data)

    def start(self, *settings: str, num_ranks: int = 1) -> None:
        """Start it; its output is empty before."""
        self._log.write_text("")
        settings = (f"data.train={self.data}", "train.num_epochs=4", "data.prefetch_batches=1", *settings)
        arguments = ["--cfg", str(self._config), "--set", *settings]
        self._processes = start_training(arguments, num_ranks=num_ranks, log=self._log)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not any(row["step"] >= step for row in read_rows(self.run / "metrics.jsonl")):
            assert self._processes[0].is_alive(), self._log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> tuple[int | None, list[str]]:
        """Exit code of one process, and the lines of its output that speak of errors."""
        for process in self._processes:
            process.join(120)
        self.codes = [process.exitcode for process in self._processes]
        lines = self._log.read_text().splitlines()
        assert not any("Traceback" in line for line in lines), lines
        return self.codes[0], [line for line in lines if line.startswith("fastssl: ")]

    def last_step(self) -> int:
        folder = last_checkpoint(self.run / "checkpoints")
        assert folder is not None
        return int(folder.name.removeprefix("step_"))


@pytest.fixture
def training(tiny_config, digits) -> Training:
    return Training(tiny_config, digits)


@pytest.mark.slow
def test_a_file_that_was_overwritten_ends_the_run_before_it_is_used(training):
    """It resumes with the first file, bit for bit as a run that nothing happened to; not with the other one."""
    training.start()
    training.wait_for_step(14)
    reader = BetonReader(training.data)
    images = slice(int(reader.data_ptr[0]), reader.alloc_table_start)
    with training.data.open("r+b") as file:
        file.seek(images.start)
        file.write(255 - reader.mmap[images])
    code, lines = training.end()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"fastssl: error: {training.data}: was written to while in use: restore it")
    step = training.last_step()
    assert 14 <= step < NUM_STEPS
    assert read_rows(training.run / "metrics.jsonl")[-1]["step"] == step

    training.start("run.resume=auto")
    code, lines = training.end()
    assert code == 2
    assert len(lines) == 1
    assert f"data.train: {training.data} is not the file that the run was trained with: it has as many" in lines[0]

    training.restore()
    training.start("run.resume=auto")
    assert training.end() == (0, [])
    whole = training.run.with_name("whole")
    training.start(f"run.dir={whole}")
    assert training.end() == (0, [])
    assert_same_end(training.run, whole)


@pytest.mark.slow
def test_a_file_that_was_cut_short_ends_the_run_with_one_line(training):
    training.start()
    training.wait_for_step(14)
    os.truncate(training.data, 1 << 20)
    begun = time.monotonic()
    code, lines = training.end()
    assert time.monotonic() - begun < 30
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"fastssl: error: {training.data}: w")
    assert training.last_step() >= 10  # of the end of the first epoch, at least

    training.restore()
    training.start("run.resume=auto")
    assert training.end() == (0, [])
    assert training.last_step() == NUM_STEPS


@pytest.mark.slow
@pytest.mark.dist
def test_all_ranks_end_where_the_file_was_overwritten(training):
    """The first that notices says so; another may only see that it is gone. The last checkpoint stays the last."""
    training.start(num_ranks=2)
    training.wait_for_step(14)
    os.utime(training.data)
    _, lines = training.end()
    assert set(training.codes) <= {2, 4}
    assert 2 in training.codes
    assert len(lines) == 2
    assert sum("was written to while in use" in line for line in lines) == training.codes.count(2)
    assert training.last_step() % 10 == 0
    training.start("run.resume=auto", num_ranks=2)  # the content is the same
    assert training.end() == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_file_that_was_removed_or_replaced_is_used_to_the_end(training, digits, change):
    training.start()
    training.wait_for_step(4)
    if change == "removed":
        training.data.unlink()
    else:
        shutil.copy(digits / "test.beton", training.data.with_suffix(".new")).rename(training.data)
    assert training.end() == (0, [])
    assert training.last_step() == NUM_STEPS
    if change == "replaced":
        training.start("run.resume=auto")
        code, lines = training.end()
        assert code == 2
        assert len(lines) == 1
        assert "is not the file that the run was trained with: it has 500 images instead of 1297" in lines[0]


@pytest.mark.slow
def test_a_checkpoint_of_an_older_version_resumes_with_a_line(training):
    training.start()
    assert training.end() == (0, [])
    folder = training.run / f"checkpoints/step_{NUM_STEPS:08d}"
    state = torch.load(folder / "state.pt", weights_only=True)
    assert set(state["data_identity"]) == {"data.train", "data.test"}
    state["data_identity"] = state["data_identity"]["data.train"][:2]
    files = read_manifest(folder)["files"] | {"state.pt": save_file(state, folder / "state.pt")}
    write_manifest(folder, files, world_size=1)
    training.start("run.resume=auto")
    code, lines = training.end()
    assert code == 0
    assert len(lines) == 1
    assert lines[0].startswith("fastssl: warning: data.train: the checkpoint is of an older version, so only the size")
