"""The loader's benchmark: its rows, a short real run, and bad input. (That it is fast is measured, not tested.)"""

import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_loader import WORKLOADS, verdicts
from fastssl.tracking.result_rows import append_rows
from tests.helpers.processes import ROOT, environment


@pytest.fixture
def small_images(tmp_path: Path) -> Path:
    """A .beton of 300 raw images of 32 px: more than a batch."""
    from pipelines.beton import BetonWriter

    rng = np.random.default_rng(0)
    with BetonWriter(tmp_path / "small.beton", 300, class_names=["x"], source="random", options={}) as writer:
        for _ in range(300):
            writer.write_raw(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), label=0)
    return tmp_path / "small.beton"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_short_run_measures_ours_and_says_what_it_did_not_measure(small_images, tmp_path, command):
    out = tmp_path / "loader.csv"
    done = command(
        sys.executable, "benchmarks/bench_loader.py", "--cifar10", small_images, "--out", out, "--threads", "1",
        "--seconds", "0.1", "--repetitions", "2", "--providers", "ours", "synthetic", "decode",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["provider"]: row for row in read(out)}
    assert set(rows) == {"fastssl, ffcv engine", "fastssl, synthetic engine", "libjpeg-turbo"}
    for name in ("fastssl, ffcv engine", "fastssl, synthetic engine"):
        slowest, middle, fastest = (float(rows[name][f"img_per_s_{key}"]) for key in ("min", "p50", "max"))
        assert 0 < slowest <= middle <= fastest
        assert (rows[name]["repetitions"], rows[name]["num_threads"], rows[name]["note"]) == ("2", "1", "")
    assert rows["libjpeg-turbo"]["img_per_s_p50"] == ""
    assert rows["libjpeg-turbo"]["note"] == "not measured: ValueError: the images are not stored as JPEG"
    assert rows["fastssl, ffcv engine"]["commit"]
    assert "beside torchvision: -, target >= 10 (goal 20): not measured" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_the_workload_it_finished(small_images, tmp_path):
    out = tmp_path / "loader.csv"
    arguments = ["--photographs", small_images, "--cifar10", small_images, "--out", out, "--providers", "synthetic"]
    short = ["--threads", "1", "--seconds", "0.1", "--repetitions", "1"]
    run = subprocess.Popen(
        [sys.executable, "benchmarks/bench_loader.py", *map(str, arguments), *short],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while run.poll() is None and not (out.exists() and out.read_text().endswith("\n")):
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    assert [(row["workload"], row["note"]) for row in read(out)] == [("photographs", "")]


@pytest.mark.slow
def test_the_profile_takes_every_stage_of_the_loader(small_images, tmp_path, command):
    out = tmp_path / "profile.csv"
    done = command(
        sys.executable, "benchmarks/bench_loader.py", "--cifar10", small_images, "--out", out, "--profile",
        "--repetitions", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["stage"]: row for row in read(out)}
    assert list(rows) == ["draw", "crop and resize", "pixel op", "loader"]  # the images are raw: none is decoded
    assert all(float(row["cpu_us_per_image_min"]) > 0 for row in rows.values())
    assert float(rows["loader"]["share_of_loader"]) == 1


def row(img_per_s, *, busy=0.05):
    return {"img_per_s_p50": img_per_s, "busy_elsewhere_fraction": busy}


def test_targets_are_judged_by_the_faster_of_torchvisions_own_forms_and_on_quiet_cores_only():
    rows = {
        "ours": row(600.0), "ours_plain": row(1400.0), "stock_ffcv": row(1000.0, busy=0.11),
        "torchvision_pil": row(100.0), "torchvision_tensor": row(80.0), "torchvision_pil_pillow_blur": row(300.0),
        "decode": row(1200.0), "synthetic": row(None),
    }  # fmt: skip
    assert list(verdicts(WORKLOADS[0], rows)) == [
        "photographs: beside torchvision: 6.0, target >= 5 (goal 8): PASS, goal not reached",
        "photographs: like for like beside stock FFCV: 1.4, target >= 1.5: "
        "not judged: other programs took 11% of the cores",
        "photographs: share of bare decode: 0.5, target >= 0.5: PASS",
    ]
    rows["stock_ffcv"] = row(1000.0)
    assert list(verdicts(WORKLOADS[1], rows)) == [
        "cifar10: beside torchvision: 6.0, target >= 10 (goal 20): MISS, goal not reached",
        "cifar10: like for like beside stock FFCV: 1.4, target >= 1.5: MISS",
    ]


def test_a_path_that_is_not_there_costs_one_line(tmp_path, command):
    path = tmp_path / "nowhere.beton"
    done = command(sys.executable, "benchmarks/bench_loader.py", "--photographs", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bench_loader: error: {path}: no such file; `fastssl convert` writes a .beton\n"


def test_the_plot_is_drawn_from_the_files_rows(tmp_path, command):
    columns = {"recipe": "byol", "num_threads": 2, "img_per_s_p50": 20.0, "img_per_s_min": 19.0, "img_per_s_max": 21.0}
    names = {"workload": "photographs", "operations": "full recipe"}
    out = tmp_path / "rows.csv"
    append_rows(out, [{"provider": "fastssl, ffcv engine"} | names | columns])
    append_rows(
        out, [{"provider": "kornia"} | names | columns | {f"img_per_s_{k}": None for k in ("p50", "min", "max")}]
    )
    done = command(sys.executable, "benchmarks/bench_loader.py", "--plot", out)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'rows.png'}\n"), done.stderr
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    done = command(sys.executable, "benchmarks/bench_loader.py", "--plot", tmp_path / "nowhere.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("nowhere.csv: no rows of a comparison to draw\n")
