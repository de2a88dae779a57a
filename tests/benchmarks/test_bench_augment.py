import csv
import sys

import pytest


@pytest.mark.slow
def test_a_short_run_has_a_row_for_each_op(tmp_path, command):
    out = tmp_path / "augment.csv"
    done = command(
        sys.executable, "benchmarks/bench_augment.py", "--device", "cpu", "--samples", "2", "4", "--repetitions", "2",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = {row["op"]: row for row in csv.DictReader(file)}
    assert {"byol", "byol without blur", "simclr", "copy"} <= set(rows)
    assert float(rows["copy"]["share_of_copy"]) == 1
    for name, num_views, size_px in (("byol", 4, 224), ("simclr", 8, 32)):
        row = rows[name]
        assert (int(row["num_views"]), int(row["size_px"])) == (num_views, size_px)
        assert 0 < float(row["ms_min"]) <= float(row["ms_p50"]) <= float(row["ms_max"])
        assert float(row["gb_per_s"]) > 0
        assert int(row["views_per_s"]) > 0
