"""The demo keeps its promise: pre-training beats raw pixels where labels are few."""

import json

import pytest

from tests.processes import ROOT, free_port


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_beats_raw_pixels(digits, tmp_path, command):
    run = tmp_path / "run"
    settings = [f"run.dir={run}", f"data.train={digits / 'train.beton'}", f"data.test={digits / 'test.beton'}"]
    train = [
        "deepspeed",
        "--num_gpus",
        "1",
        "--master_port",
        free_port(),
        "fastssl/train.py",
        "--cfg",
        ROOT / "configs/demo.yaml",
    ]
    done = command(*train, "--set", *settings, timeout_s=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert command("fastssl", "eval", run).returncode == 0
    results = json.loads((run / "eval.json").read_text())["results"]

    def best(row: str, num_labels: str) -> float:
        few = results[row]["few_label"][num_labels]
        return max(few["logistic_mean"], few["nearest_mean"])

    assert best("pre-trained encoder", "5") - best("raw pixels", "5") >= 0.04
    assert best("pre-trained encoder", "20") - best("raw pixels", "20") >= 0.02
    assert best("raw pixels", "5") > best("untrained encoder", "5")
