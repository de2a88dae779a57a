"""Real trainings on data sets of many shards: kills, faults of a server, changed files, and what must stay secret."""

import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fastssl.checkpoint.save_load import last_checkpoint
from fastssl.tracking.writers import read_rows
from pipelines.shards.manifest import MANIFEST_NAME
from tests.helpers.fault_server import FaultServer
from tests.helpers.processes import start_training
from tests.helpers.runs import assert_same_end, final_state, losses
from tests.helpers.shards import split

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 20  # two epochs of ten


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory) -> Path:
    """The digits in three shards; not to be changed."""
    return split(digits / "train.beton", tmp_path_factory.mktemp("shards") / "set")


class Training:
    """A training on some data, in processes of its own."""

    def __init__(self, config: Path, name: str, *settings: str, num_ranks: int = 1) -> None:
        self.run, self._config, self._log = config.parent / name, config, config.parent / f"{name}.txt"
        self._settings, self._num_ranks = settings, num_ranks
        self._ranks: list[BaseProcess] = []

    def start(self, *settings: str) -> None:
        self._log.write_text("")
        arguments = ["--cfg", str(self._config), "--set", f"run.dir={self.run}", *self._settings, *settings]
        self._ranks = start_training(arguments, num_ranks=self._num_ranks, log=self._log)

    def wait_for_step(self, step: int) -> None:
        end_s = time.monotonic() + 200
        while not any(row["step"] >= step for row in read_rows(self.run / "metrics.jsonl")):
            assert any(rank.is_alive() for rank in self._ranks), self.output()
            assert time.monotonic() < end_s, self.output()
            time.sleep(0.002)

    def signal(self, number: signal.Signals) -> None:
        for rank in self._ranks:
            assert rank.pid is not None
            os.kill(rank.pid, number)

    def end(self) -> set[int | None]:
        """Exit codes."""
        for rank in self._ranks:
            rank.join(300)
        return {rank.exitcode for rank in self._ranks}

    def output(self) -> str:
        return self._log.read_text()

    def errors(self) -> list[str]:
        assert "Traceback" not in self.output()
        return [line for line in self.output().splitlines() if line.startswith("fastssl: error")]


@pytest.mark.dist
def test_two_ranks_that_are_stopped_or_killed_end_bit_for_bit_the_same(tiny_config, shards):
    settings = (f"data.train={shards}", "run.checkpoint_every_steps=2", "run.resume=auto", "train.num_epochs=6")
    whole = Training(tiny_config, "whole", *settings, num_ranks=2)
    whole.start()
    assert whole.end() == {0}, whole.output()
    assert [row["step"] for row in losses(whole.run) if "kind" not in row] == list(range(1, 61))
    for number in (signal.SIGTERM, signal.SIGKILL):
        cut = Training(tiny_config, number.name, *settings, num_ranks=2)
        cut.start()
        cut.wait_for_step(13)  # in mid-epoch
        cut.signal(number)
        assert cut.end() == ({0} if number == signal.SIGTERM else {-9}), cut.output()
        folder = last_checkpoint(cut.run / "checkpoints")
        assert folder is not None
        step = int(folder.name.removeprefix("step_"))
        assert 12 <= step < 60
        cut.start()
        assert cut.end() == {0}, cut.output()
        assert f"resumed at step {step}" in cut.output()
        assert_same_end(whole.run, cut.run)


def test_a_training_through_two_hundred_faults_ends_bit_for_bit_the_same(tiny_config, shards):
    whole = Training(tiny_config, "whole", f"data.train={shards}")
    whole.start()
    assert whole.end() == {0}, whole.output()
    kinds = ("cut", "429", "500", "503", "flip")
    with FaultServer(shards, seed=3, share=0.06, kinds=kinds, max_in_a_row=2) as server:
        server.plan(MANIFEST_NAME, *["ok"] * 8)  # two wrong ones in turn end the start
        faulty = Training(tiny_config, "faulty", f"data.train={server.url}")
        faulty.start()
        assert faulty.end() == {0}, faulty.output()
        outcomes = [request.outcome for request in server.requests]
    met = {kind: outcomes.count(kind) for kind in kinds}
    print(met, len(outcomes))
    assert min(met.values()) > 20
    assert sum(met.values()) >= 200
    assert "takes its place" not in faulty.output()
    assert_same_end(whole.run, faulty.run)


def test_a_second_epoch_of_a_training_is_read_from_the_cache(tiny_config, shards, tmp_path):
    cache = (f"data.cache_dir={tmp_path / 'cache'}", "data.cache_gb=0.1")
    local = Training(tiny_config, "local", f"data.train={shards}")
    local.start()
    assert local.end() == {0}, local.output()
    with FaultServer(shards) as server:
        nums = []
        for name in ("first", "second"):
            remote = Training(tiny_config, name, f"data.train={server.url}", *cache)
            remote.start()
            assert remote.end() == {0}, remote.output()
            nums.append(len(server.requests))
            assert_same_end(local.run, remote.run)
        ranges = [(request.path, request.range) for request in server.requests if request.range]
    assert len(ranges) == len(set(ranges)) > 1297
    assert nums[1] - nums[0] < 10  # the manifest


@pytest.mark.parametrize("change", ["cut short", "written to"])
def test_a_shard_that_changes_under_a_training_ends_it_in_one_line(tiny_config, digits, tmp_path, change):
    folder = split(digits / "train.beton", tmp_path / "own")
    settings = (f"data.train={folder}", "train.num_epochs=6", "data.prefetch_batches=1")
    whole = Training(tiny_config, "whole", *settings)
    whole.start()
    assert whole.end() == {0}, whole.output()
    kept = {path: path.read_bytes() for path in folder.glob("*.beton")}
    run = Training(tiny_config, "run", *settings)
    run.start()
    run.wait_for_step(13)
    for path, content in kept.items():
        if change == "cut short":
            os.truncate(path, 4096)
        else:
            with path.open("r+b") as file:
                file.write(bytes(len(content)))
    assert run.end() == {2}, run.output()
    (line,) = run.errors()
    assert line.startswith(f"fastssl: error: {folder}/x-")
    assert ("was written to while in use" in line) == (change == "written to")
    assert change == "written to" or "was cut short" in line or " bytes while in use" in line
    assert "restore it, then start again (run.resume=auto resumes a training)" in line
    for path, content in kept.items():
        path.write_bytes(content)
    run.start("run.resume=auto")
    assert run.end() == {0}, run.output()
    assert_same_end(whole.run, run.run)


SECRETS = ("user-7f", "word-7f", "key-7f", "token-7f", "dXNlci03Zjp3b3JkLTdm")  # the last one as it is sent


def test_nothing_secret_is_written_down(tiny_config, shards, command, monkeypatch, tmp_path):
    run = tiny_config.parent / "run"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user-7f password word-7f\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-7f")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-7f")
    train = [sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set"]
    said = []
    with FaultServer(shards, user="user-7f:word-7f") as server:
        host = server.url.removeprefix("http://")
        refused = command(*train, f"data.train=http://user-7f:word-7f@{host}")
        assert refused.returncode == 2
        assert "belong into ~/.netrc" in refused.stderr
        assert not run.exists()
        for arguments in (
            [*train, f"data.train={server.url}"],
            ["fastssl", "report", run],
            ["fastssl", "eval", run],
        ):
            done = command(*arguments)
            assert done.returncode == 0, done.stderr
            said.append(done)
        assert {request.authorization for request in server.requests} == {"Basic dXNlci03Zjp3b3JkLTdm"}
        server.always(MANIFEST_NAME, "403")
        said += [refused, command(*train, f"data.train={server.url}", "run.resume=auto")]
        assert said[-1].returncode == 2
    assert len(losses(run)) > NUM_STEPS
    assert final_state(run)
    texts = {f"output {i}": (done.stdout + done.stderr).encode() for i, done in enumerate(said)}
    texts |= {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert any(host.encode() in text for text in texts.values())
    assert len(texts) > 10
    found = [(name, secret) for name, text in texts.items() for secret in SECRETS if secret.encode() in text]
    assert found == []
