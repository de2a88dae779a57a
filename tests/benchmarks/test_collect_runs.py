"""A real run's rows and curve, and a run that was not judged."""

import csv
import json
import sys

import pytest

from benchmarks import collect_runs


def test_a_judged_run_becomes_rows_and_a_curve(tiny_config, tmp_path, command, capsys):
    run, out = tmp_path / "run", tmp_path / "results" / "tiny.csv"
    trained = command(sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set", "train.num_epochs=1")
    assert trained.returncode == 0, trained.stderr
    with pytest.raises(SystemExit, match=r"no eval\.json"):
        collect_runs.main([str(run), "--out", str(out)])
    assert not out.exists()
    judged = command("fastssl", "eval", run)
    assert judged.returncode == 0, judged.stderr
    collect_runs.main([str(run), "--out", str(out)])

    results = json.loads((run / "eval.json").read_text())["results"]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4  # raw pixels, untrained, pre-trained; kNN, logistic, both at 5 labels
    expected = 100 * results["pre-trained encoder"]["knn"]["top1"]
    [knn] = [row for row in rows if row["row"] == "pre-trained encoder" and row["metric"] == "knn_k20_top1"]
    assert float(knn["percent"]) == pytest.approx(expected, abs=0.005)
    assert knn["seed"] == "0"
    assert knn["command"].startswith("python fastssl/train.py --cfg tiny.yaml")
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "pre-trained encoder" in capsys.readouterr().out
