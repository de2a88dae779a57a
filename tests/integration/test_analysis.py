"""`fastssl hessian` and `fastssl gradflow` on tiny runs, and what they refuse."""

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.integration.test_bad_input import assert_one_line

FEW = ["--num-images", "64", "--batch-size", "32", "--num-iterations", "6", "--num-probes", "2", "--top-k", "1"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_runs_become_spectra_in_one_table(tiny_config, tmp_path, command):
    runs = {"mio": "{name: mio}", "byol": "{name: byol, predictor_hidden: 16}"}
    for name, loss in runs.items():
        settings = [f"run.dir={tmp_path / name}", f"loss={loss}", "train.num_epochs=1", "optim.warmup_epochs=0"]
        done = command(sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set", *settings)
        assert done.returncode == 0, done.stderr
    mio, byol = (tmp_path / name for name in runs)
    done = command("fastssl", "hessian", mio, byol, *FEW, "--out", tmp_path / "spectra")
    assert done.returncode == 0, done.stderr
    assert "the target network" in done.stdout
    found = rows_of(tmp_path / "spectra/spectra.csv")
    assert [row["loss"] for row in found] == ["mio", "byol"]
    assert all(float(row["largest"]) > float(row["smallest"]) for row in found)
    assert int(found[1]["num_parameters"]) > int(found[0]["num_parameters"])  # the predictor counts
    assert (tmp_path / "spectra/density.png").exists()
    own = mio / "hessian/step_00000010"
    assert len(rows_of(own / "ritz_values.csv")) == 12
    assert json.loads((own / "summary.json").read_text())["gradient_difference"] < 1e-4

    again = command("fastssl", "hessian", mio, *FEW, "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again/ritz_values.csv").read_text() == (own / "ritz_values.csv").read_text()

    done = command("fastssl", "gradflow", mio, "--num-images", "128")
    assert done.returncode == 0, done.stderr
    summary = json.loads((mio / "gradflow/step_00000010/summary.json").read_text())
    rows, _, whole = summary["gradients"]
    assert rows["max_relative_difference"] < 1e-12
    assert whole["max_relative_difference"] < 1e-4
    curves = rows_of(mio / "gradflow/step_00000010/coefficients.csv")
    assert sum(int(row["num_positive_pairs"]) for row in curves if row["of_this_run"] == "1") == 128
    assert_one_line(command("fastssl", "gradflow", byol), "loss.name: byol has no closed-form")


@pytest.fixture
def run(tiny_config):
    """A run's folder with a checkpoint of the weights that it began with."""
    import torch

    from fastssl.build_run import build_model
    from fastssl.checkpoint.save_load import plain_weights
    from fastssl.config import load_config
    from fastssl.tracking.run_folder import RunFolder

    cfg = load_config(tiny_config)
    folder = RunFolder(cfg.run.dir)
    folder.create(cfg, world_size=1)
    checkpoint = folder.checkpoints / "step_00000001"
    checkpoint.mkdir(parents=True)
    torch.save(plain_weights(build_model(cfg, 16), asdict(cfg.model), 16), checkpoint / "weights.pt")
    return folder.path


def test_what_is_refused_before_a_run_is_read(tmp_path, in_process):
    for command in ("hessian", "gradflow"):
        assert_one_line(in_process(command, tmp_path), "config.yaml")
        assert_one_line(in_process(command, tmp_path, "--batch-size", "1"), "--batch-size")
    assert_one_line(in_process("hessian", tmp_path, "--top-k", "0"), "--top-k must be in [1, 64]")
    assert_one_line(in_process("hessian", tmp_path, "--top-k", "9", "--num-iterations", "8"), "--top-k", "8")
    assert_one_line(in_process("hessian", tmp_path, "--num-probes", "0"), "--num-probes")
    assert_one_line(in_process("hessian", tmp_path, tmp_path), "given twice")


def test_what_a_run_cannot_give(run, in_process):
    assert_one_line(in_process("hessian", run, "--step", "7"), "--step", "7")
    assert_one_line(in_process("hessian", run, "--num-images", "4096", "--batch-size", "32"), "--num-images", "1297")
    assert_one_line(in_process("gradflow", run, "--num-images", "33", "--batch-size", "32"), "--num-images", "32")
    assert_one_line(in_process("gradflow", run, "--set", "loss={name: vicreg}"), "loss.name: vicreg", "mio, simclr")
    assert_one_line(in_process("hessian", run, "--set", "loss={name: minc, gha: true}"), "loss.gha")
    assert_one_line(in_process("hessian", run, "--set", "loss={name: byol}"), "manifest.json is missing")
    assert_one_line(in_process("hessian", run, "--set", "model.projector_dim=8"), "another model")
    assert_one_line(in_process("hessian", run, "--out", "/dev/null/x"), "--out", "/dev/null/x")


def test_a_run_without_a_checkpoint_is_refused(run, in_process):
    (run / "checkpoints").rename(run / "moved")
    for command in ("hessian", "gradflow"):
        assert_one_line(in_process(command, run), "no checkpoint")
