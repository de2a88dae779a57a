"""The benchmark of the objectives measures what it says."""

from benchmarks.bench_objectives import COLUMNS, inputs, measure, step
from fastssl.losses import LOSSES, build_loss


def test_a_row_has_every_column_and_memory_of_the_pairs_or_of_the_moment() -> None:
    row = measure("minc", 512, 16, 0.0)
    assert tuple(row) == COLUMNS
    assert row["num_repetitions"] >= 5
    assert 0 < row["ms_min"] <= row["ms_p50"]
    assert row["peak_mb"] < 8  # 512 rows of 16 numbers are 32 KB


def test_losses_without_a_target_are_called_without_one() -> None:
    for name in ("simclr", "tico"):
        step(name, build_loss(LOSSES[name][0](), 8), inputs(64, 8))
