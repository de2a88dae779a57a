"""`fastssl launch`: what is shown of a launcher that succeeds and of one that fails."""

import signal
import subprocess
import sys

import pytest

from fastssl.cli import main
from tests.helpers.processes import ROOT, free_port

LOG = "[2026-11-27 19:35:22,415] [INFO] [launch.py:152:main] WORLD INFO DICT: {'localhost': [0]}"
TORCH_LOG = "W1127 19:35:22.415000 4242 torch/distributed/run.py:803] Setting OMP_NUM_THREADS"


def launch(capfd, program: str) -> tuple[int, list[str], list[str]]:
    code = main(["launch", sys.executable, "-c", program])
    out, err = capfd.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_a_launcher_that_succeeds_shows_the_training_alone(capfd):
    program = f"import sys; print({LOG!r}); print('epoch 1/2'); print({TORCH_LOG!r}, file=sys.stderr)"
    assert launch(capfd, program) == (0, ["epoch 1/2"], [])


def test_a_launcher_that_fails_shows_everything_and_the_error_last(capfd):
    program = f"""
import sys
print({LOG!r}, flush=True)
for rank in (1, 0):
    print(f"fastssl: error (rank {{rank}}): optim.base_lr must be in (0, 1e38], not -1.0", file=sys.stderr, flush=True)
print("Traceback of the launcher", file=sys.stderr)
sys.exit(2)
"""
    code, out, err = launch(capfd, program)
    assert (code, out) == (2, [])
    assert err == ["Traceback of the launcher", LOG, "fastssl: error: optim.base_lr must be in (0, 1e38], not -1.0"]


def test_the_cause_is_last(capfd):
    program = """
import sys
print("fastssl: error (rank 1): data.train: damaged", file=sys.stderr)
print("fastssl: error (rank 0): lost another process of the run after step 3 (reset)", file=sys.stderr)
sys.exit(4)
"""
    code, _, err = launch(capfd, program)
    assert code == 4
    assert [line.split(": ")[1] for line in err] == ["error (rank 0)", "error (rank 1)"]


def test_no_such_launcher(capfd):
    assert main(["launch", "no-such-launcher", "--num_gpus", "2"]) == 2
    assert capfd.readouterr().err.startswith("fastssl: error: no-such-launcher: No such file or directory")


def test_help_is_its_own(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["launch", "--help"])
    assert "LAUNCHER" in capfd.readouterr().out


def test_a_signal_reaches_the_launcher():
    program = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-m", "fastssl.cli", "launch", sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 7


def test_a_training_goes_on_when_nobody_reads_its_lines(tmp_path):
    done = tmp_path / "done"
    program = f"import pathlib\nfor i in range(20000): print('epoch', i)\npathlib.Path({str(done)!r}).touch()"
    command = f'{sys.executable} -m fastssl.cli launch {sys.executable} -c "$0" | head -1'
    shown = subprocess.run(["bash", "-c", command, program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.exists()
    assert (shown.stdout, shown.stderr) == ("epoch 0\n", "")


@pytest.mark.slow
def test_deepspeed_itself(tiny_config, tmp_path, command):
    launcher = ["fastssl", "launch", "deepspeed", "--num_gpus", "2", "--master_port", free_port(), "fastssl/train.py"]
    done = command(*launcher, "--cfg", tiny_config)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["mio", "epoch", "epoch"]
    assert done.stderr == ""
    failed = command(*launcher, "--cfg", tiny_config, "--set", "optim.base_lr=-1")
    assert failed.returncode == 2
    assert "exits with return code = 2" in failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last == "fastssl: error: optim.base_lr must be in (0, 1e38], not -1.0"
    assert failed.stderr.count("fastssl: error") == 1
