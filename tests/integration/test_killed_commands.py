"""`fastssl convert`, `eval` and `compare` killed with kill -9: the same command again ends as if nothing had been.

A command is killed before one of its operations on files (open, rename, remove), which a seed chooses: what can be left
half-done lies between two of them.
"""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

import pipelines.convert
from fastssl.checkpoint.checksums import sha256_of
from pipelines.beton import BetonWriter
from tests.helpers.image_folders import write_image_folder
from tests.helpers.processes import forkserver, run_in_this_process, start_training

NUM_IMAGES = 100
HOW = ("--resume", "--overwrite")
OPERATIONS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")


def run_and_die(arguments: list[str], log: Path, folder: Path, counter: Path, moment: int) -> None:
    """Run a command until its operation number `moment` on files below `folder`; negative: to its end.

    Every operation adds a byte to `counter`.
    """
    count = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    num_done = 0

    def on_event(event: str, values: tuple) -> None:
        nonlocal num_done
        if event not in OPERATIONS or not os.fsdecode(str(values[0])).startswith(str(folder)):
            return
        if num_done == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        num_done += 1
        os.write(count, b".")

    pipelines.convert.CHECKPOINT_EVERY_S = 0.01
    sys.addaudithook(on_event)
    run_in_this_process(arguments, log)


class Command:
    """A command that works in a folder."""

    def __init__(self, arguments: Sequence[str | Path], folder: Path, log: Path) -> None:
        self._arguments, self._folder, self._log = list(map(str, arguments)), folder, log
        self._counter = log.with_name("counter")

    def run(self, moment: int = -1) -> int:
        """Run it, to its end or until that operation on files; the number of those that it did."""
        task = (self._arguments, self._log, self._folder, self._counter, moment)
        process = forkserver().Process(target=run_and_die, args=task)
        process.start()
        process.join()
        assert process.exitcode in ((0,) if moment < 0 else (0, -signal.SIGKILL)), self._log.read_text()
        return self._counter.stat().st_size


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("killed") / "images", NUM_IMAGES)


@pytest.mark.parametrize(
    ("how", "num_kills"),
    [
        pytest.param("--resume", 4, marks=pytest.mark.slow),
        pytest.param("--overwrite", 2, marks=pytest.mark.slow),
        *(pytest.param(how, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for how in HOW),
    ],
)
def test_convert(how: str, num_kills: int, images: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands = []
    for folder in (whole, killed):
        folder.mkdir()
        arguments = ["convert", "--from", "folder", images, folder / "x.beton", "--on-error", "skip", how]
        commands.append(Command(arguments, folder, tmp_path / "log.txt"))
    num_operations = commands[0].run()
    rng = random.Random(f"{how} {num_kills}")
    for kill in range(num_kills):
        if how == "--overwrite" and not (killed / "x.beton").exists():
            with BetonWriter(killed / "x.beton") as writer:
                writer.write_raw(np.zeros((4, 4, 3), np.uint8))
        # every other one near the end, where the file gets its name
        moment = num_operations - 1 - rng.randrange(10) if kill % 2 else rng.randrange(num_operations)
        commands[1].run(moment)
        if kill % 2:
            commands[1].run()
            assert contents(killed) == contents(whole)
            shutil.rmtree(killed)
            killed.mkdir()


def contents(folder: Path) -> dict[str, str]:
    """The checksum of each file."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(tiny_config: Path, tmp_path: Path) -> Path:
    """The folder of a trained run."""
    changes = ["train.num_epochs=1", "optim.warmup_epochs=0", "eval.what=[knn,linear]", "eval.baselines=false"]
    ranks = start_training(["--cfg", str(tiny_config), "--set", *changes], num_ranks=1, log=tmp_path / "log.txt")
    ranks[0].join()
    assert ranks[0].exitcode == 0, (tmp_path / "log.txt").read_text()
    return tmp_path / "run"


@pytest.mark.slow
def test_eval(trained: Path, tmp_path: Path) -> None:
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    shutil.copytree(trained, whole)
    num_operations = Command(["eval", whole], whole, tmp_path / "log.txt").run()
    assert num_operations > 5
    command = Command(["eval", killed], killed, tmp_path / "log.txt")
    for _ in range(2):
        shutil.copytree(trained, killed)
        for _ in range(2):
            command.run(rng.randrange(num_operations))
        command.run()
        assert files_of(killed) == files_of(whole)
        assert contents(killed / "features") == contents(whole / "features")
        assert results_of(killed / "eval.jsonl") == results_of(whole / "eval.jsonl")
        shutil.rmtree(killed)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def results_of(path: Path) -> dict[tuple[str, str], dict]:
    """The last line of each encoder and protocol, without times; every line is whole."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["wall_s"], line["environment"]
    return {(line["encoder"], line["name"]): line for line in lines}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compare(tiny_config: Path, tmp_path: Path) -> None:
    """Killed with all it has started: at random, at the first features, and between two protocols."""
    comparisons = {name: Comparison(tiny_config, tmp_path / name, tmp_path / "log.txt") for name in ("whole", "killed")}
    comparisons["whole"].end()
    killed, rng = comparisons["killed"], random.Random(0)
    run = killed.out / "tiny/seed_0"
    killed.kill_when(lambda: run.exists(), rng.uniform(0, 3))
    killed.kill_when(lambda: any((run / "features").glob(".*.tmp")))
    killed.kill_when(lambda: (run / "eval.jsonl").exists())
    killed.end()
    assert killed.percents() == comparisons["whole"].percents()
    assert not list(killed.out.rglob("*.tmp"))


class Comparison:
    """`fastssl compare` of one configuration under one seed, as the leader of a session."""

    def __init__(self, config: Path, out: Path, log: Path) -> None:
        self.out, self._log = out, log
        changes = ["train.num_epochs=1", "optim.warmup_epochs=0", "eval.baselines=false", "eval.what=[knn,linear]"]
        self._arguments = ["compare", str(config), "--seeds", "1", "--out", str(out), "--set", *changes]

    def end(self) -> None:
        process = self._start()
        process.join()
        assert process.exitcode == 0, self._log.read_text()

    def kill_when(self, is_moment: Callable[[], bool], delay_s: float = 0.0) -> None:
        process = self._start()
        while process.is_alive() and not is_moment():
            time.sleep(0.001)
        time.sleep(delay_s)
        assert process.pid
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, self._log.read_text()

    def percents(self) -> list[tuple[str, str]]:
        with (self.out / "compare.csv").open(newline="") as file:
            return [(row["metric"], row["percent"]) for row in csv.DictReader(file)]

    def _start(self) -> BaseProcess:
        process = forkserver().Process(target=run_in_a_session, args=(self._arguments, self._log))
        process.start()
        return process


def run_in_a_session(arguments: list[str], log: Path) -> None:
    os.setsid()
    run_in_this_process(arguments, log)
