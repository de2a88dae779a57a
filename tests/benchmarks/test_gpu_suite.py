"""The suite for GPU machines: stages that pass, fail, hang or are interrupted, and a small run of all."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_suite import (
    STAGES,
    Command,
    Result,
    Suite,
    gpu_test_files,
    last_error,
    report,
    run_stage,
    run_stages,
    step,
    summary_line,
    why_not_interpreted,
)
from tests.helpers.processes import ROOT, environment

SUITE = [sys.executable, "benchmarks/gpu_suite.py"]


def python(code: str, **settings: Any) -> list[Command]:
    return [Command(name="code", argv=[sys.executable, "-c", code], **settings)]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(device="cpu", smoke=True, out=tmp_path, data=tmp_path, started="now")


def test_a_failing_stage_does_not_stop_the_next(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {
        "good": python("print('3 passed')", must_say=r"\d passed"),
        "bad": python("import sys; print('before'); raise ValueError('no luck')"),
        "silent": python("print('3 skipped')", must_say=r"\d passed"),
        "absent": [Command(name="x", argv=["/no/such/program"])],
        "skipped": [Command(name="x", skipped="there is no x"), *python("print('y')")],
    }
    results = run_stages(suite, stages, time.monotonic() + 60)
    assert {result.stage: result.status for result in results} == {
        "good": "pass", "bad": "fail", "silent": "fail", "absent": "fail", "skipped": "pass",
    }  # fmt: skip
    reasons = {result.stage: result.reason for result in results}
    assert reasons["bad"] == "exit code 1: ValueError: no luck"
    assert "No such file" in reasons["absent"]
    assert "before" in (suite.out / "bad.log").read_text()
    assert "x: skipped: there is no x" in (suite.out / "skipped.log").read_text()
    assert "bad: fail in" in capsys.readouterr().out  # said at once


def test_a_command_gets_its_environment(suite: Suite) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'], 'threads', 'PATH' in os.environ)"
    command = python(code, must_say=r"(?m)^7 threads True$", environment={"OMP_NUM_THREADS": "7"})
    assert run_stage("env", command, suite.out / "log", limit_s=20).status == "pass"


def test_each_way_to_take_a_step_is_profiled(suite: Suite) -> None:
    commands = step(replace(suite, device="cuda", smoke=False))
    assert [command.name for command in commands] == [
        "eager, batch 512",
        "captured, batch 512",
        "compiled, batch 512",
        "eager, batch 128",
        "captured, batch 128",
        "compiled and captured, batch 128",
    ]
    assert not any(command.skipped for command in commands)


def test_the_tests_of_a_gpu_are_found_by_their_mark() -> None:
    in_kernels, elsewhere = gpu_test_files()
    assert {"tests/kernels/test_fused_losses_gpu.py", "tests/kernels/augment/test_fused_gpu.py"} < set(in_kernels)
    assert {"tests/integration/test_fp16.py", "tests/fastssl/step/test_syncs_gpu.py"} < set(elsewhere)


def test_a_stage_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    grandchild = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    grandchild += f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    code = f"import subprocess, sys; print('waits', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    result = run_stage("hangs", [*python(code), *python("print('next')")], tmp_path / "log", limit_s=4)
    assert result.status == "fail"
    assert "code: stopped at its limit of 4 s; it last said: waits" in result.reason
    assert result.seconds < 10
    deadline = time.monotonic() + 10
    while is_alive(int(pid_file.read_text())):
        assert time.monotonic() < deadline, "the grandchild lives on"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_time_that_a_stage_leaves_goes_to_those_after_it(suite: Suite) -> None:
    first, second = run_stages(suite, {"a": python(""), "b": python("")}, time.monotonic() + 40)
    assert 19 < first.limit_s < 21
    assert second.limit_s > 30


def test_stages_without_time_are_not_reached(suite: Suite) -> None:
    results = run_stages(suite, {"a": python(""), "b": python("")}, time.monotonic())
    assert [summary_line(result) for result in results] == [f"{name}: not reached: no time was left" for name in "ab"]


def test_sigterm_ends_the_stage_and_still_reports(tmp_path: Path) -> None:
    code = f"""
import sys
from benchmarks import gpu_suite
sleep = gpu_suite.Command(name="sleep", argv=[sys.executable, "-c", "import time; time.sleep(100)"])
gpu_suite.STAGES = {{"sleeps": lambda suite: [sleep], "next": gpu_suite.STAGES["env"]}}
sys.argv = ["gpu_suite.py", "--device", "cpu", "--smoke", "--stages", "sleeps,next", "--out", {str(tmp_path)!r}]
sys.exit(gpu_suite.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "sleeps.log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    fail, not_reached = output.splitlines()[-2:]
    assert fail.startswith("sleeps: fail in")
    assert fail.endswith(": interrupted")
    assert not_reached == "next: not reached: interrupted"
    with (tmp_path / "summary.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["fail", "not reached"]


def test_report_shows_rows_and_epochs_of_a_training_that_was_stopped(
    suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    (suite.out / "step.csv").write_text("label,img_per_s,device_ms\neager,1234.5,\nbroken,,\n")
    run = suite.out / "train_now"
    run.mkdir()
    epoch = '{"kind": "epoch", "step": 5, "epoch": 0, "loss": 0.5, "img_per_s": 100.0, "positive_counts": [1, 2]}\n'
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n' + epoch + '{"kind": "epo')
    report(suite, [Result(stage="step", status="pass", seconds=3.2, limit_s=9.0)])
    output = capsys.readouterr().out
    assert "eager" in output
    assert "broken" not in output
    assert output.splitlines()[-1] == "step: pass in 3 s"
    with (suite.out / "train.csv").open() as file:
        assert [(row["epoch"], row["loss"]) for row in csv.DictReader(file)] == [("0", "0.5")]


def test_the_reason_is_the_last_error() -> None:
    assert last_error("a\nKeyError: 'x'\nRuntimeError: y\n  10%\r 20%\nended\n") == "RuntimeError: y"
    assert last_error("\n") == "it said nothing"
    assert last_error("FAILED tests/a.py::b\n1 failed in 3 s") == "FAILED tests/a.py::b"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stages", "env,nonsense"], "nonsense"),
        (["--minutes", "0"], "--minutes"),
        (["--data", "/no/such/folder"], "cifar10_train.beton"),
        (["--device", "cpu"], "--smoke"),
    ],
)
def test_bad_input_ends_with_one_line(arguments: list[str], named: str) -> None:
    done = subprocess.run([*SUITE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]


def test_it_starts_without_any_package() -> None:
    code = "import benchmarks.gpu_suite, sys; print([n for n in ('torch', 'pydantic', 'yaml') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_stage_passes_without_a_gpu(tmp_path: Path) -> None:
    command = [*SUITE, "--device", "cpu", "--smoke", "--minutes", "18", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1150)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[-len(STAGES) - 1 :]
    assert [line.split(" in ")[0] for line in lines] == [f"{name}: pass" for name in ("data", *STAGES)]
    tiles = () if why_not_interpreted() else ("tiles",)
    for name in ("device", "loss", *tiles, "augment", "loader", "step", "train"):
        with (tmp_path / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file)), name
    with (tmp_path / "train.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert not [line for line in os.listdir("/proc") if line.isdigit() and str(tmp_path) in command_line_of(line)]


def command_line_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
