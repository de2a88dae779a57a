"""What a report reads from runs in every state, also where files are missing or damaged."""

import json

import pytest

from fastssl.errors import ConfigError
from fastssl.report.gather import gather
from tests.helpers.runs import make_run


def test_runs_in_every_state(tmp_path):
    make_run(tmp_path / "running").lock()
    make_run(tmp_path / "crashed", epochs_done=2)
    make_run(tmp_path / "new", epochs_done=0)
    found = {name: gather(tmp_path / name) for name in ("running", "crashed", "new")}
    assert [found[name].run.state for name in found] == ["running", "crashed", "crashed"]
    assert [len(found[name].of_kind("epoch")) for name in found] == [1, 2, 0]
    assert [len(found[name].of_kind(None)) for name in found] == [1, 2, 0]
    assert found["new"].speed is None
    assert found["new"].views is None


def test_what_is_damaged_is_left_out(tmp_path):
    run = make_run(tmp_path / "a")
    run.environment.write_text("[1, 2")
    run.metrics.write_text('{"step": 1, "epoch": 0, "loss": 1.0}\n[]\n{"step": 2, "ep')
    run.evaluations.write_text('{"encoder": "x"}\n')
    run.nonfinite.write_text(json.dumps({"step": 3, "loss": "nan", "sample_ids": [1, 2]}) + "\n")
    for name, text in (
        ("step_00000001", "eigenvalue,density\n0,1\n1,x\n"),
        ("step_00000002", "eigenvalue,density\n0,1\n"),
    ):
        (run.hessian / name).mkdir(parents=True)
        (run.hessian / name / "density.csv").write_text(text)
    (run.views).mkdir()
    found = gather(run.path)
    assert found.environment == {}
    assert [row["step"] for row in found.rows] == [1]
    assert found.evaluations == []
    assert found.nonfinite[0]["sample_ids"] == [1, 2]
    assert [spectrum.step for spectrum in found.spectra] == ["step_00000002"]
    assert found.views is None


@pytest.mark.parametrize("text", [None, "a: 1\n", "{", "[1]"])
def test_what_is_no_run_is_refused_with_its_name(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        gather(tmp_path)
