"""A real run's rows and curve, and a run that was not judged."""

import csv
import sys

import pytest

from benchmarks import collect_runs
from fastssl.tracking.writers import read_rows


@pytest.mark.slow
def test_a_judged_run_becomes_rows_and_a_curve(tiny_config, digits, tmp_path, command, capsys):
    run, out = tmp_path / "run", tmp_path / "results" / "tiny.csv"
    trained = command(sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set", "train.num_epochs=1")
    assert trained.returncode == 0, trained.stderr
    with pytest.raises(SystemExit, match=r"no eval\.jsonl"):
        collect_runs.main([str(run), "--out", str(out)])
    assert not out.exists()
    judged = command("fastssl", "eval", run)
    assert judged.returncode == 0, judged.stderr
    collect_runs.main([str(run), "--out", str(out)])

    judged_again = command("fastssl", "eval", run, "--what", "knn", "--on", digits / "test.beton")
    assert judged_again.returncode == 0, judged_again.stderr
    judged = read_rows(run / "eval.jsonl")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        len(rows) == 3 * 5
    )  # raw pixels, untrained, pre-trained; kNN, linear, logistic, two at 5 labels; not those of --on
    [expected] = [
        100 * row["top1"]
        for row in judged
        if (row["encoder"], row["name"], row["on"]) == ("pre-trained encoder", "knn", None)
    ]
    [knn] = [row for row in rows if row["row"] == "pre-trained encoder" and row["metric"] == "knn_k20_top1"]
    assert float(knn["percent"]) == pytest.approx(expected, abs=0.005)
    assert knn["seed"] == "0"
    assert knn["command"].startswith("python fastssl/train.py --cfg tiny.yaml")
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "pre-trained encoder" in capsys.readouterr().out
