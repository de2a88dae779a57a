import csv
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench_convert import verdict


@pytest.mark.slow  # FFCV's writer, which forks, has been seen to hang in a child
def test_a_short_run_measures_both_writers(tmp_path, command):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 256, (80, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.jpg", quality=98)
    out = tmp_path / "convert.csv"
    done = command(
        sys.executable, "benchmarks/bench_convert.py", folder, "--num-workers", "2", "--num-repetitions", "1",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        ours, ffcv, decoding = csv.DictReader(file)
    assert ours["num_images"] == ffcv["num_images"] == decoding["num_images"] == "6"
    for row in (ours, ffcv, decoding):
        slowest, middle, fastest = (float(row[f"img_per_s_{key}"]) for key in ("min", "p50", "max"))
        assert 0 < slowest <= middle <= fastest
    assert float(ffcv["ratio_to_ffcv"]) == float(decoding["ratio_to_decoding"]) == 1
    assert decoding["file_bytes"] == "0"
    assert "beside FFCV's DatasetWriter" in done.stdout


def test_the_target_is_five_times():
    assert verdict([{"ratio_to_ffcv": 5.0}]) == "beside FFCV's DatasetWriter: 5.0, target >= 5: PASS"
    assert verdict([{"ratio_to_ffcv": 4.9}]).endswith("MISS")


def test_a_folder_that_is_not_there_costs_one_line(tmp_path, command):
    done = command(sys.executable, "benchmarks/bench_convert.py", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bench_convert: error: {tmp_path / 'nowhere'}: no such folder\n"
