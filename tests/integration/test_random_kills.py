"""Trainings killed with kill -9 at random moments, several times in a row: each ends as if nothing had been.

The moments come from a seed: while the processes start or restore, anywhere in the steps (data, forward, backward,
optimizer, figures of an epoch), or in a save. `FASTSSL_KILLS=200` sets how many kills there are in all:

    FASTSSL_KILLS=200 python -m pytest -m slow tests/integration/test_random_kills.py
"""

import os
import random
import shutil
import time
from itertools import product
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.helpers.processes import start_training
from tests.helpers.runs import assert_same_end

CASES = list(product(("mio", "minc", "byol"), (1, 2), (0, 1, 2)))
NUM_KILLS = -(-int(os.environ.get("FASTSSL_KILLS", "30")) // len(CASES))  # of each case
SHORT = ("data.global_batch_size=256", "run.checkpoint_every_steps=2")  # two epochs of five steps
TIME_LIMIT_S = 120


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300 + 60 * NUM_KILLS)
@pytest.mark.parametrize(("loss", "num_ranks", "zero_stage"), CASES)
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(loss, num_ranks, zero_stage, tiny_config, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = [f"loss={{name: {loss}}}", f"train.zero_stage={zero_stage}", *SHORT, "run.resume=auto"]
    arguments = ["--cfg", str(tiny_config), "--set", *settings]
    training = Training(arguments, num_ranks, tmp_path / "log.txt")
    rng = random.Random(f"{loss} {num_ranks} {zero_stage}")
    training.start(f"run.dir={whole}")
    start_s, fit_s = training.seconds_to_start(), training.seconds_to_end()
    num_kills = 0
    while num_kills < NUM_KILLS:
        training.start(f"run.dir={run}")
        if training.is_killed_at(*choose_moment(rng, start_s, fit_s), run / "checkpoints"):
            num_kills += 1
        else:  # it was done before
            assert_same_end(whole, run)
            shutil.rmtree(run)
    training.start(f"run.dir={run}")
    training.seconds_to_end()
    assert_same_end(whole, run)
    print(f"{num_kills} kills, {training.num_in_saves} of them in a save")


def choose_moment(rng: random.Random, start_s: float, fit_s: float) -> tuple[str, float]:
    """Where, and how many seconds after that has begun."""
    where = rng.choices(("start", "steps", "save"), (1, 3, 2))[0]
    return where, rng.uniform(0, {"start": start_s, "steps": 0.6 * fit_s, "save": 0.02}[where])


class Training:
    """A run that is started and killed.

    Attributes:
        num_in_saves: Kills that left a half-written checkpoint.
    """

    def __init__(self, arguments: list[str], num_ranks: int, log: Path) -> None:
        self.num_in_saves = 0
        self._arguments, self._num_ranks, self._log = arguments, num_ranks, log
        self._ranks: list[BaseProcess] = []

    def start(self, setting: str) -> None:
        self._log.write_text("")
        self._ranks = start_training([*self._arguments, setting], num_ranks=self._num_ranks, log=self._log)

    def seconds_to_start(self) -> float:
        """Wait for the headline, which stands before the first step."""
        return self._wait(lambda: " -> " in self._log.read_text() or not self._is_running())

    def seconds_to_end(self) -> float:
        seconds = self._wait(lambda: not self._is_running())
        assert [rank.exitcode for rank in self._ranks] == [0] * self._num_ranks, self._log.read_text()
        return seconds

    def is_killed_at(self, where: str, delay_s: float, checkpoints: Path) -> bool:
        """Kill every rank at that moment; False where all were done before."""
        if where != "start":
            self.seconds_to_start()
        if where == "save":
            self._wait(lambda: any(checkpoints.glob(".step_*.tmp")) or not self._is_running())
        time.sleep(delay_s)
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.join()
        self.num_in_saves += any(checkpoints.glob(".step_*.tmp"))
        codes = {rank.exitcode for rank in self._ranks}
        assert -9 in codes or codes == {0}, self._log.read_text()
        return codes != {0}

    def _is_running(self) -> bool:
        return any(rank.is_alive() for rank in self._ranks)

    def _wait(self, is_over) -> float:
        begun = time.monotonic()
        while not is_over():
            assert time.monotonic() - begun < TIME_LIMIT_S, self._log.read_text()
            time.sleep(0.001)
        return time.monotonic() - begun
