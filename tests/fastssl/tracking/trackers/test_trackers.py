"""What is asked of a run that names trackers, before it starts."""

import pytest

from fastssl.config import RunConfig, build_config, free_keys
from fastssl.errors import ConfigError
from fastssl.tracking import trackers


def test_no_tracker_is_the_default_and_a_resumed_run_may_name_one():
    assert RunConfig().trackers == ()
    assert build_config({"run": {"trackers": ["mlflow", "wandb"]}}).run.trackers == ("mlflow", "wandb")
    assert "run.trackers" in free_keys()


@pytest.mark.parametrize("value", [["wandb", "wandb"], "wandb", ["tensorbord"]])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match=r"run\.trackers"):
        build_config({"run": {"trackers": value}})


@pytest.mark.parametrize(("name", "install"), [("wandb", "wandb>=0.31,<1"), ("mlflow", "mlflow-skinny>=3.17,<4")])
@pytest.mark.parametrize("how", ["--cfg", "images"])
def test_a_missing_package_is_one_line_before_anything_is_written(
    name, install, how, tiny_config, tmp_path, in_process, monkeypatch
):
    monkeypatch.setattr(trackers, "package_version", lambda _: None)
    what = ["--cfg", tiny_config] if how == "--cfg" else [tmp_path]
    done = in_process("train", *what, "--set", f"run.trackers=[{name}]", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    package = install.split(">")[0]
    assert line == f"fastssl: error: run.trackers: {name} needs the package {package}: pip install '{install}'"
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_there_is_accepted():
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    trackers.check_installed(("wandb", "mlflow"))
