"""The profile of the step: what is counted in a trace, and a run on the CPU."""

import csv
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import profile_step
from benchmarks.profile_step import _Reads, count_events
from tests.helpers.processes import ROOT, environment


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_a_trace_of_two_steps_on_a_gpu() -> None:
    events = [
        event("kernel", "gemm", 0, 1000, tid=7),
        event("kernel", "norm", 500, 1000, tid=13),  # on another stream: half of it at the same time
        event("kernel", "gemm", 4000, 1500, tid=7),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 6000, 500, tid=7),
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cuda_driver", "cuLaunchKernelEx", 10, 5),
        event("cuda_runtime", "cudaGraphLaunch", 20, 5),
        event("cuda_runtime", "cudaMemcpyAsync", 30, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 40, 5),
        event("cuda_runtime", "cudaStreamWaitEvent", 50, 5),
        event("cuda_runtime", "cudaDeviceSynchronize", 7000, 5),  # the window's own
        event("cpu_op", "aten::mm", 0, 9),
        {"ph": "i", "name": "Iteration", "ts": 0},
    ]
    counts = count_events(events, num_steps=2, num_top=2)
    assert counts.device_ms == pytest.approx((1500 + 1500 + 500) / 2 / 1e3)
    assert (counts.kernels, counts.launches, counts.memcpys, counts.waits) == (1.5, 1.5, 0.5, 0.5)
    assert counts.top[0] == {"name": "gemm", "us_per_step": 1250.0, "calls_per_step": 1.0}


def test_without_a_gpu_the_outermost_operators_count() -> None:
    events = [event("cpu_op", "aten::linear", 0, 100), event("cpu_op", "aten::addmm", 10, 50)]
    events.append(event("cpu_op", "aten::addmm", 30, 40, tid=2))
    counts = count_events(events, num_steps=1, num_top=5)
    assert counts.kernels == 2
    assert [row["name"] for row in counts.top] == ["aten::linear", "aten::addmm"]


def test_reads_of_values_are_found_at_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_step, "OWN_FOLDERS", (str(Path(__file__).parent),))
    found: Counter[str] = Counter()
    with _Reads(found):
        x = torch.ones(3) * 2
        for _ in range(2):
            x.sum().item()
    assert list(found.values()) == [2]
    assert next(iter(found)).startswith("tests/benchmarks/test_profile_step.py:")


def test_waits_of_a_gpu_are_found_at_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(profile_step, "OWN_FOLDERS", (str(Path(__file__).parent),))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found: Counter[str] = Counter()
    with profile_step._cuda_syncs(found):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert list(found.values()) == [3]
    assert next(iter(found)).startswith("tests/benchmarks/test_profile_step.py:")
    assert modes == ["warn", 0]


@pytest.mark.slow
def test_row_table_and_trace(tiny_config: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "step.csv", tmp_path / "trace.json"
    options = ["--num-warmup", "1", "--num-steps", "2", "--label", "tiny", "--out", out, "--trace", trace]
    command = [sys.executable, "benchmarks/profile_step.py", "--cfg", tiny_config, "--set", "run.device=cpu", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "aten::" in done.stdout
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["label"], row["device"], row["num_steps"]) == ("tiny", "cpu", "2")
    assert float(row["wall_ms"]) >= float(row["host_ms"]) > 0
    assert float(row["kernels"]) > 100
    assert not (tmp_path / "run").exists()  # the config's run folder is left alone
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cfg", "/no/such.yaml"], "/no/such.yaml"),
        (["--cfg", "configs/demo.yaml", "--set", "train.nonsense=1"], "train.nonsense"),
        (["--cfg", "configs/demo.yaml", "--num-steps", "0"], "--num-steps"),
        (["--cfg", "configs/demo.yaml", "--trace", "/no/such/folder/x.json"], "--trace"),
    ],
)
def test_bad_input_ends_with_one_line(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *arguments])
    try:
        code = profile_step.main()
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
