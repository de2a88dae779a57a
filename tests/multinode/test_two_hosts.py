"""A training over two hosts: the same figures as on one, and a clear end where a host is lost."""

import time
from pathlib import Path

import pytest

from fastssl.checkpoint.save_load import last_checkpoint
from tests.helpers.hosts import two_hosts, wait_for, why_not
from tests.helpers.processes import free_port
from tests.helpers.runs import losses

pytestmark = [pytest.mark.dist, pytest.mark.multinode, pytest.mark.timeout(2000)]
_WHY_NOT = why_not()
if _WHY_NOT:
    pytest.skip(_WHY_NOT, allow_module_level=True)

START_S = 900  # imports, and a first compilation, also on a busy machine


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("host-a slots=1\nhost-b slots=1\n")
    return path


def start(hosts, hostfile, config, *settings):
    logs = [config.parent / f"host{host.rank}" for host in hosts]
    arguments = ["--cfg", config, *(["--set", *settings] if settings else [])]
    return logs, [host.deepspeed(hostfile, *arguments, log=log) for host, log in zip(hosts, logs, strict=True)]


def start_and_reach(hosts, hostfile, config, *settings, step: int):
    """A run of two hosts that has taken `step` steps and saved a checkpoint."""
    logs, processes = start(hosts, hostfile, config, *settings)
    run = config.parent / "run"

    def is_there() -> bool:
        assert all(process.poll() is None for process in processes), Path(f"{logs[0]}.err").read_text()
        return len(losses(run)) >= step and last_checkpoint(run / "checkpoints") is not None

    wait_for(is_there, timeout_s=START_S, what=f"step {step}")
    return logs, processes


def assert_says_so(log: Path, rank: int, *parts: str) -> None:
    """One line of ours on stderr, and nobody's traceback."""
    text = Path(f"{log}.err").read_text()
    ours = [line for line in text.splitlines() if line.startswith("fastssl: error")]
    assert len(ours) == 1, text
    assert ours[0].startswith(f"fastssl: error (rank {rank}): "), text
    assert "Traceback" not in text
    for part in parts:
        assert part in ours[0]


def assert_ends(process, within_s: float) -> None:
    began = time.monotonic()
    code = process.wait(timeout=within_s)
    assert code == 4, f"exit code {code} after {time.monotonic() - began:.1f} s"


def test_two_hosts_give_the_figures_of_one(hosts, hostfile, tiny_config, command):
    logs, processes = start(hosts, hostfile, tiny_config)
    for log, process in zip(logs, processes, strict=True):
        assert process.wait(timeout=START_S) == 0, Path(f"{log}.err").read_text()
    assert "on 2 x cpu" in Path(f"{logs[0]}.out").read_text()
    one = tiny_config.parent / "one"
    ranks = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "fastssl/train.py"]
    done = command(*ranks, "--cfg", tiny_config, "--set", f"run.dir={one}", timeout_s=START_S)
    assert done.returncode == 0, done.stderr
    # The sum of two numbers is the same in either order, so these are equal to the last bit.
    assert losses(tiny_config.parent / "run") == losses(one)
    assert len(losses(one)) == 22


def test_a_host_that_dies_ends_the_run_which_goes_on_on_one_host(hosts, hostfile, tiny_config, command):
    logs, processes = start_and_reach(hosts, hostfile, tiny_config, "train.num_epochs=8", step=15)
    hosts[1].kill()
    assert_ends(processes[0], within_s=60)
    assert_says_so(logs[0], 0, "lost another process", "after step ", "10.77.0.2", "run.resume=auto")

    ranks = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "fastssl/train.py"]
    done = command(*ranks, "--cfg", tiny_config, "--set", "train.num_epochs=8", "run.resume=auto", timeout_s=START_S)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    steps = [row["step"] for row in losses(tiny_config.parent / "run") if "kind" not in row]
    assert steps == list(range(1, 81))


def test_a_host_that_is_cut_off_ends_the_run_on_both(hosts, hostfile, tiny_config):
    logs, processes = start_and_reach(hosts, hostfile, tiny_config, "train.num_epochs=50", step=15)
    hosts[1].unplug()
    began = time.monotonic()
    for process in processes:
        assert_ends(process, within_s=max(60 - (time.monotonic() - began), 0.1))
    assert time.monotonic() - began > 5  # nobody was told: it had to be noticed
    for rank, log in enumerate(logs):
        assert_says_so(log, rank, "lost another process", "after step ", "run.resume=auto")


@pytest.mark.parametrize("comes", [0, 1])
def test_a_host_that_never_comes(comes, hosts, hostfile, tiny_config):
    timeout = "run.rendezvous_timeout_s=5"
    log = tiny_config.parent / "alone"
    process = hosts[comes].deepspeed(hostfile, "--cfg", tiny_config, "--set", timeout, log=log)
    assert_ends(process, within_s=START_S)
    assert_says_so(log, comes, "not all 2 processes connected to 10.77.0.1:29400", timeout)
    assert not (tiny_config.parent / "run").exists()


def test_nothing_is_left_behind(tmp_path):
    with two_hosts() as made:
        process = made[0].start("sleep", "1000", log=tmp_path / "sleep")
        wait_for(lambda: made[0].pids(), timeout_s=10, what="the program's start")
    assert process.wait(timeout=10) != 0
    assert not any(Path("/run/netns", host.namespace).exists() for host in made)
