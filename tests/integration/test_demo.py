"""The demo keeps its promise: pre-training beats raw pixels where labels are few."""

import pytest

from fastssl.tracking.writers import read_rows
from tests.helpers.processes import ROOT, free_port


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
    top1 = {(row["encoder"], row["name"]): row["top1"] for row in read_rows(run / "eval.jsonl")}

    def best(encoder: str, num_labels: int) -> float:
        return max(top1[encoder, f"{name}_{num_labels}_labels_per_class"] for name in ("logistic", "nearest"))

    assert best("pre-trained encoder", 5) - best("raw pixels", 5) >= 0.04
    assert best("pre-trained encoder", 20) - best("raw pixels", 20) >= 0.02
    assert best("raw pixels", 5) > best("untrained encoder", 5)
