"""The benchmark of the losses: every provider computes the same loss, and the rows say what was measured."""

import argparse
import csv
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from benchmarks import bench_loss, loss_providers
from benchmarks.bench_loss import forward_backward, measure_cell, measure_times, quantiles
from benchmarks.loss_providers import LOSSES, PRODUCTS, NotInstalledError, build
from tests.helpers.processes import ROOT, environment

PROVIDERS = ("fastssl chunked", "eager", "strips + checkpoint", "Lightly")


@pytest.mark.parametrize("loss", LOSSES)
def test_providers_compute_one_loss(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.loss_providers.CHUNK_ROWS", 5)  # strips that straddle the views
    z = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = build("eager", loss, device="cpu")
    for provider in PROVIDERS:
        try:
            actual = build(provider, loss, device="cpu")
        except NotInstalledError:
            assert provider == "Lightly"
            continue
        torch.testing.assert_close(actual(z), expected(z), rtol=2e-6, atol=0)
        torch.testing.assert_close(forward_backward(actual, z), forward_backward(expected, z), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_products_in_bf16_differ_by_their_rounding(loss: str) -> None:
    z = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded, exact = (
        forward_backward(partial(loss_providers._whole_matrix, loss, dtype), z)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2


def test_every_provider_says_the_precision_of_its_products() -> None:
    assert PRODUCTS["fastssl fused"] == "float16"
    assert {name for name, dtype in PRODUCTS.items() if dtype == "bfloat16"} == {"eager bf16", "torch.compile bf16"}
    for provider in ("eager bf16", "torch.compile bf16"):
        with pytest.raises(NotInstalledError, match="bf16 are a GPU's"):
            build(provider, "exp", device="cpu")


def test_compiled_code_is_for_one_shape_and_never_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the second shape for a dynamic one, and runs the ninth uncompiled, without a word."""
    of_one_shape = []

    def backend(graph, example_inputs):
        of_one_shape.append(not any(isinstance(x, torch.SymInt) for x in example_inputs))
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)  # restored at the end
    torch._dynamo.reset()
    rows = [torch.randn(2, 4 + i, 8) for i in range(9)]
    for z in rows[:8]:
        build("torch.compile", "exp", device="cpu")(z)
    assert of_one_shape == [True] * 8
    with pytest.raises(FailOnRecompileLimitHit):
        build("torch.compile", "exp", device="cpu")(rows[8])
    torch._dynamo.reset()  # as each cell does
    build("torch.compile", "exp", device="cpu")(rows[8])
    assert of_one_shape == [True] * 9
    torch._dynamo.reset()


def test_a_provider_that_fails_leaves_the_cell_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(z: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no rows\nat all")

    eager = build("eager", "exp", device="cpu")
    monkeypatch.setitem(bench_loss.PROVIDERS, "Lightly", lambda loss, device: broken)
    monkeypatch.setattr(bench_loss, "peak_memory", lambda *_: 1)
    arguments = argparse.Namespace(providers=["Lightly", "eager"], seconds=0.01, deadline_s=math.inf)
    failed, measured = measure_cell(arguments, "exp", 64, 8, "cpu")
    assert failed["note"] == "not measured: ZeroDivisionError: no rows"
    assert failed["ms_p50"] is None
    assert measured["ms_p50"] > 0
    times, notes = measure_times({"Lightly": broken, "eager": eager}, torch.zeros(2, 8, 4).requires_grad_(), 0.01)
    assert list(times) == ["eager"]
    assert notes == {"Lightly": "not measured: ZeroDivisionError: no rows"}


def test_what_is_not_begun_in_time_is_left_out() -> None:
    arguments = argparse.Namespace(providers=["eager"], seconds=0.01, deadline_s=0.0)
    (row,) = measure_cell(arguments, "exp", 64, 8, "cpu")
    assert row["note"] == "not measured: the table's time is over; --minutes gives it more"
    assert row["ms_p50"] is None


def test_a_process_that_fails_is_not_taken_for_one_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for returncode, error, text in ((1, RuntimeError, "^KeyError: 'loss'$"), (-9, MemoryError, "^$")):
        run = SimpleNamespace(returncode=returncode, stderr="Traceback:\nKeyError: 'loss'\n", stdout="")
        monkeypatch.setattr(bench_loss.subprocess, "run", lambda *_, run=run, **__: run)
        with pytest.raises(error, match=text):
            bench_loss.peak_memory("eager", "exp", torch.zeros(2, 8, 4))


def test_a_provider_without_the_loss_says_why() -> None:
    with pytest.raises(NotInstalledError, match="need a GPU"):
        build("fastssl fused", "exp", device="cpu")
    with pytest.raises(NotInstalledError, match="SigLIP"):
        build("siglip-kernel", "exp", device="cuda")


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == (1.0, 2.5, 4.0)


@pytest.mark.slow
def test_rows_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "loss.csv"
    options = ["--device", "cpu", "--rows", "1024", "--widths", "16", "--losses", "nt_xent", "--out", out]
    command = [
        sys.executable,
        "benchmarks/bench_loss.py",
        *options,
        "--providers",
        "fastssl chunked",
        "eager",
        "Lightly",
    ]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=200)
    with out.open() as file:
        rows = {row["provider"]: row for row in csv.DictReader(file) if row["loss"] == "nt_xent"}
    ours, eager = rows["fastssl chunked"], rows["eager"]
    for row in (ours, eager):
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["gradient_error"]) < 1e-5
        assert row["products"] == "float32"
        assert row["command"].startswith("python benchmarks/bench_loss.py")
    assert float(eager["peak_mb"]) > 3 * 1024**2 * 4 / 1e6  # matrices of 1024 x 1024 in fp32
    assert "not measured" in rows["Lightly"]["note"] or float(rows["Lightly"]["ms_p50"]) > 0
    assert out.with_suffix(".png").stat().st_size > 10_000
