"""`fastssl hessian` and `fastssl gradflow` on tiny runs, and what they refuse."""

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from fastssl.losses import LOSSES
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
    done = command("fastssl", "hessian", mio, byol, *FEW, "--wide", "--out", tmp_path / "spectra")
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


@pytest.fixture
def series(run):
    """The run with a second checkpoint of other weights, at step 20."""
    import torch

    weights = torch.load(run / "checkpoints/step_00000001/weights.pt", weights_only=True)
    for value in weights["projector"].values():
        if value.dim() == 2:
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    (run / "checkpoints/step_00000020").mkdir()
    torch.save(weights, run / "checkpoints/step_00000020/weights.pt")
    return run


@pytest.mark.slow
def test_a_series_has_a_row_for_each_checkpoint(series, tmp_path, in_process):
    less = [*FEW, "--num-iterations", "3", "--num-probes", "1"]
    done = in_process("hessian", series, *less, "--steps", "last,1,20")
    assert done.returncode == 0, done.stderr
    rows = rows_of(series / "hessian/compared/spectra.csv")
    assert [row["step"] for row in rows] == ["1", "20"]
    assert rows[0]["largest"] != rows[1]["largest"]
    for row in rows:
        assert (row["seed"], row["run"]) == ("0", str(series))
        assert row["command"]
        ratios = float(row["largest"]) / float(row["trace"]), abs(float(row["smallest"])) / float(row["largest"])
        assert (float(row["largest_over_trace"]), float(row["smallest_over_largest"])) == pytest.approx(ratios)
        own = json.loads((series / f"hessian/step_{int(row['step']):08d}/summary.json").read_text())
        assert own["largest_over_trace"] == float(row["largest_over_trace"])
    assert (series / "hessian/compared/density.png").exists()
    assert "not shown" in done.stdout
    alone = in_process("hessian", series, *less, "--step", "1", "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    of_series = series / "hessian/step_00000001/ritz_values.csv"
    assert (tmp_path / "alone/ritz_values.csv").read_text() == of_series.read_text()

    few = ["--num-images", "64", "--batch-size", "32"]
    done = in_process("gradflow", series, *few, "--steps", "1,20", "--out", tmp_path / "flow", "--json")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "flow/flow.csv")
    shown = [{name: str(value) for name, value in row.items()} for row in json.loads(done.stdout)["rows"]]
    assert shown == [{name: row[name] for name in shown[0]} for row in rows]
    assert [row["step"] for row in rows] == ["1", "20"]
    assert rows[0]["positive_similarity"] != rows[1]["positive_similarity"]
    assert all(float(row["projections_max_difference"]) < 1e-12 for row in rows)
    for row in rows:
        assert (row["loss"], row["num_images"], row["seed"]) == ("mio exp", "64", "0")
        assert row["torch"]
        folder = series / f"gradflow/step_{int(row['step']):08d}"
        assert (folder / "coefficients.png").exists()
        own = json.loads((folder / "summary.json").read_text())
        assert own["flow"]["repulsion"] == float(row["repulsion"])
    assert (tmp_path / "flow/flow.png").exists()


def test_a_series_that_cannot_be_is_refused(series, in_process, capfd):
    for command in ("hessian", "gradflow"):
        done = in_process(command, series, "--steps", "1,7")
        assert_one_line(done, "--steps: ", "no checkpoint of step 7, only of 1, 20")
        assert not (series / command).exists()
        for options, reason in (
            (["--step", "1", "--steps", "1,last"], "--steps: not allowed with argument --step"),
            (["--steps", "1,-2"], "must be steps with commas between them"),
            (["--steps", ""], "must be steps"),
        ):
            with pytest.raises(SystemExit) as ended:
                in_process(command, series, *options)
            assert ended.value.code == 2
            assert reason in capfd.readouterr().err


def test_gradients_of_losses_at_one_network(run, tmp_path, in_process):
    options = ["--batch-sizes", "16", "32", "--num-batches", "3"]
    done = in_process("gradnorm", run, *options)
    assert done.returncode == 0, done.stderr
    rows = rows_of(run / "gradnorm/step_00000001/gradnorm.csv")
    assert [(row["loss"], row["batch_size"]) for row in rows] == [
        (name, size) for size in ("16", "32") for name in LOSSES
    ]
    assert all(float(row["projections_norm"]) > 0 and float(row["variance"]) > 0 for row in rows)
    assert {row["num_batches"] for row in rows} == {"3"}
    assert {row["relative_to_simclr"] for row in rows if row["loss"] == "simclr"} == {"1.0"}

    for name, tau in (("cold", 0.1), ("warm", 1.0)):
        (tmp_path / f"{name}.yaml").write_text(f"loss: {{name: simclr, temperature: {tau}}}\n")
    configs = [tmp_path / "cold.yaml", tmp_path / "warm.yaml"]
    done = in_process("gradnorm", run, *configs, *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    cold, warm, *_ = rows_of(tmp_path / "out/gradnorm.csv")
    assert (cold["loss"], warm["loss"]) == ("cold", "warm")
    assert float(cold["relative_to_simclr"]) > 1 > float(warm["relative_to_simclr"])
    assert float(cold["cosine_to_first"]) == 1


def test_gradients_of_losses_that_cannot_be_compared(run, tmp_path, in_process):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "x.yaml", tmp_path / "a/x.yaml"):
        path.write_text("loss: {name: mio}\n")
    refused = {
        "--num-batches must be >= 2": ["--num-batches", "1"],
        "--batch-sizes must be >= 2": ["--batch-sizes", "8", "1"],
        "a batch of 5000 images is more than": ["--batch-sizes", "5000"],
        "two configurations are named x": [tmp_path / "x.yaml", tmp_path / "a/x.yaml"],
        "no checkpoint of step 7": ["--step", "7"],
        "views.recipe: gradients are compared for two views": ["--set", "views.recipe=multicrop", "views.size_px=null"],
    }
    for reason, options in refused.items():
        assert_one_line(in_process("gradnorm", run, *options), reason)
    assert_one_line(in_process("gradnorm", tmp_path), "config.yaml")


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
    assert_one_line(in_process("hessian", run, "--set", "model.projector_dim=8"), "weights of another model")
    assert_one_line(in_process("hessian", run, "--out", "/dev/null/x"), "--out", "/dev/null/x")


def test_a_run_without_a_checkpoint_is_refused(run, in_process):
    (run / "checkpoints").rename(run / "moved")
    for command in ("hessian", "gradflow"):
        assert_one_line(in_process(command, run), "no checkpoint")
