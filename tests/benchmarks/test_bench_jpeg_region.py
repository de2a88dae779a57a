"""The benchmark of decoding only what is seen: its rows after a short run, and bad input."""

import csv

import numpy as np

from benchmarks.bench_jpeg_region import main
from pipelines.beton import BetonWriter
from tests.pipelines.engines.test_engines import make_jpegs, write_jpegs


def test_a_short_run_writes_a_row_for_each(tmp_path):
    photographs, out = write_jpegs(tmp_path / "x.beton", make_jpegs(3)).path, tmp_path / "rows.csv"
    assert main([str(photographs), "--recipe", "digits", "--repetitions", "1", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        rows = {row["measured"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["decode", "loader"]
    for row in rows.values():
        assert 0 < float(row["speedup_min"]) <= float(row["speedup_p50"]) <= float(row["speedup_max"])


def test_raw_images_are_refused_in_one_line(tmp_path, capsys):
    with BetonWriter(tmp_path / "raw.beton", 1) as writer:
        writer.write_raw(np.zeros((8, 8, 3), np.uint8), label=0)
    assert main([str(tmp_path / "raw.beton"), "--out", str(tmp_path / "rows.csv")]) == 2
    assert capsys.readouterr().err == "bench_jpeg_region: error: the images are not stored as JPEG\n"
