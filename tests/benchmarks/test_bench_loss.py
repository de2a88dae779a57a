"""The benchmark of the losses: every provider computes the same loss, and the rows say what was measured."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bench_loss import forward_backward, quantiles
from benchmarks.loss_providers import LOSSES, NotInstalledError, build
from tests.processes import ROOT, environment

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


def test_a_provider_without_the_loss_says_why() -> None:
    with pytest.raises(NotInstalledError, match="need a GPU"):
        build("fastssl fused", "exp", device="cpu")
    with pytest.raises(NotInstalledError, match="SigLIP"):
        build("siglip-kernel", "exp", device="cuda")


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == (1.0, 2.5, 4.0)


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
        assert row["command"].startswith("python benchmarks/bench_loss.py")
    assert float(eager["peak_mb"]) > 3 * 1024**2 * 4 / 1e6  # matrices of 1024 x 1024 in fp32
    assert "not measured" in rows["Lightly"]["note"] or float(rows["Lightly"]["ms_p50"]) > 0
    assert out.with_suffix(".png").stat().st_size > 10_000
