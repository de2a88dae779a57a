"""`fastssl bench loader` on a small file of photographs: a real, short run; and bad input."""

import csv
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.bench.loader import bench_loader, check_job
from pipelines.bench.streams import Job
from pipelines.errors import DataError
from pipelines.views import ViewsConfig
from tests.helpers.fault_server import FaultServer
from tests.helpers.shards import write_image_shards
from tests.pipelines.engines.test_engines import make_jpegs, write_jpegs

STREAMS = ["engine ffcv", "engine dali", "engine resident", "synthetic ceiling", "libjpeg-turbo alone"]
DISK = ["disk, order of an epoch", "disk, sequential"]
STAGES = ["draw", "decode", "crop and resize", "pixel op"]
NUM_IMAGES = 20


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("photographs") / "photographs.beton", make_jpegs(NUM_IMAGES)).path


@pytest.mark.slow
def test_a_short_run_prints_a_table_and_what_bounds_the_machine(photographs, tmp_path, command, monkeypatch):
    """DALI is hidden from it, as where it is not installed."""
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "rows.csv"
    done = command(
        "fastssl", "bench", "loader", photographs, "--size-px", "64", "--engines", "ffcv", "dali", "resident",
        "--batch-size", "4", "--threads", "1", "--seconds", "0.2", "--device", "cpu", "--out", out, "--wide",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = {row["measured"]: row for row in csv.DictReader(file)}
    assert list(rows) == STREAMS + DISK + STAGES
    for name in STREAMS:
        if name != "engine dali":
            slowest, middle, fastest = (float(rows[name][f"img_per_s_{key}"]) for key in ("min", "p50", "max"))
            assert 0 < slowest <= middle <= fastest
            assert rows[name]["note"] == ""
    dali = rows["engine dali"]
    assert dali["img_per_s_p50"] == ""
    assert dali["note"].startswith("not measured: engine dali needs NVIDIA DALI: pip install")
    for name in DISK:
        assert bool(rows[name]["img_per_s_p50"]) != rows[name]["note"].startswith("not measured: ")
    assert all(float(rows[name]["us_per_image"]) >= 0 for name in STAGES)
    assert (dali["recipe"], dali["size_px"], dali["batch_size"], dali["num_threads"]) == ("byol", "64", "4", "1")
    assert dali["command"].startswith("fastssl bench loader photographs.beton")
    table, sentences = done.stdout.strip().split("\n\n")
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == list(rows)
    assert "bounds this machine" in sentences
    assert sentences.endswith(".")


def job_on(path: Path) -> Job:
    return Job(beton=str(path), views=ViewsConfig(), batch_size=NUM_IMAGES, num_threads=1, seed=0)


@pytest.mark.slow
def test_shards_are_measured_in_lanes_and_a_network_by_blocks(tmp_path):
    folder = write_image_shards(tmp_path / "set")
    job = replace(job_on(folder), views=ViewsConfig(recipe="weak", size_px=16), batch_size=64)
    report = bench_loader(job, ["ffcv", "torch"], window_s=0.2, num_repetitions=1)
    rows = {row["measured"]: row for row in report.rows}
    assert {"engine ffcv", "engine torch", "synthetic ceiling", "draw", "pixel op"} <= rows.keys()
    assert rows["disk, order of an epoch"]["note"] == "not measured: many files"
    assert rows["libjpeg-turbo alone"]["note"].endswith("the images are not stored as JPEG")
    with FaultServer(folder) as server:
        report = bench_loader(replace(job, beton=server.url), ["ffcv"], window_s=0.2, num_repetitions=1)
    rows = {row["measured"]: row for row in report.rows}
    assert float(rows["network, blocks of shards"]["mb_per_s"] or 0) > 0
    assert "3 shards, 515 images" in report.sentences[-1]
    assert re.search(r"MB come before the first batch, which takes about \d+\.\d s\.$", report.sentences[-1])


def test_a_batch_of_all_images_is_accepted(photographs):
    check_job(job_on(photographs), ["ffcv"], 0.1)


@pytest.mark.parametrize(
    ("changes", "engines", "window_s", "message"),
    [
        ({"beton": "/no/such.beton"}, ["ffcv"], 1.0, "/no/such.beton: no such file"),
        ({}, ["ffcv", "dally"], 1.0, "--engines must be of ffcv, dali, resident, torch, got dally"),
        ({}, ["synthetic"], 1.0, "--engines must be of"),  # always measured
        ({"batch_size": NUM_IMAGES + 1}, ["ffcv"], 1.0, f"--batch-size must be in 1..{NUM_IMAGES}"),
        ({"num_threads": 0}, ["ffcv"], 1.0, "--threads must be in 1"),
        ({"num_threads": 100_000}, ["ffcv"], 1.0, "--threads must be in 1"),
        ({}, ["ffcv"], 0.0, "--seconds must be > 0"),
        ({}, ["ffcv"], float("nan"), "--seconds must be > 0"),
    ],
)
def test_bad_input(photographs, changes, engines, window_s, message):
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        check_job(replace(job_on(photographs), **changes), engines, window_s)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--batch-size", "21"], "--batch-size must be in 1..20"),
        (["--engines", "dally"], "--engines must be of"),
        (["--recipe", "byl"], "views.recipe must be one of"),
    ],
)
def test_bad_input_costs_one_line(photographs, options, part, in_process):
    done = in_process("bench", "loader", photographs, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastssl: error: ")
    assert part in done.stderr
    assert done.stderr.count("\n") == 1
