"""The rows of several comparisons in one file, replaced where they are measured again, and their table."""

import csv
from pathlib import Path

import pytest

from benchmarks import collect_study

HELD_OUT, TEST = "0.2 of a.beton, held out", "test.beton"
ENVIRONMENT = {"checkpoint_step": "312", "command": "fastssl compare", "commit": "abc"}


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def compared(config: str, percents: list[float], scored_on: str = HELD_OUT, **tuned: str) -> list[dict[str, str]]:
    return [
        {"config": config, **tuned, "seed": str(seed), "metric": "knn", "percent": str(percent), "scored_on": scored_on}
        | ENVIRONMENT
        for seed, percent in enumerate(percents)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    write_table(runs / "mio/compare.csv", compared("mio", [30.0, 32.0, 34.0], tuned="optim.base_lr=0.2"))
    write_table(runs / "mio/tune.csv", compared("mio", [29.0], tuned="optim.base_lr=0.2"))
    write_table(runs / "minc/compare.csv", compared("minc_clip", [29.0, 30.0, 34.0], tuned="optim.base_lr=0.05"))
    write_table(runs / "batch_minc/compare.csv", compared("minc_clip global_batch_size=32", [28.0, 29.0, 30.0]))
    return runs


def test_rows_become_one_file_and_one_table(folder, tmp_path, capsys):
    out, norms = tmp_path / "study.csv", tmp_path / "gradnorm.csv"
    norms.write_text("loss,relative_to_simclr\nmio,1.05\nminc_clip,2.5\n")
    collect_study.main([str(folder), "--out", str(out), "--gradnorm", str(norms)])
    rows = collect_study.read(out)
    assert len(rows) == 3 + 1 + 3 + 3
    assert {row["commit"] for row in rows} == {"abc"}
    assert {row["tuned"] for row in rows if row["comparison"] == "batch_minc"} == {""}
    shown = capsys.readouterr().out
    losses, sweep = shown.split("batch sizes: ")
    best, other = (line.split() for line in losses.splitlines()[2:4])
    assert best[:3] == ["mio", "knn", "32.0"]
    assert best[-2:] == ["optim.base_lr=0.2", "1.05"]
    assert other[:3] == ["minc_clip", "knn", "31.0"]
    assert other[-5:] == ["-1.0", "0.58", "3", "optim.base_lr=0.05", "2.5"]  # differences -1, -2, 0
    assert "minc_clip global_batch_size=32" in sweep
    assert "minc_clip global_batch_size=32" not in losses


def test_a_measurement_is_replaced_and_another_part_is_added(folder, tmp_path):
    out = tmp_path / "study.csv"
    collect_study.main([str(folder), "--out", str(out)])
    write_table(folder / "mio/compare.csv", compared("mio", [40.0, 42.0, 44.0], TEST, tuned="optim.base_lr=0.2"))
    write_table(folder / "minc/compare.csv", compared("minc_clip", [1.0, 2.0, 3.0], tuned="optim.base_lr=0.05"))
    collect_study.main([str(folder), "--out", str(out)])
    rows = collect_study.read(out)
    assert len(rows) == 10 + 3
    percents = {(row["config"], row["scored_on"]): row["percent"] for row in rows if row["seed"] == "2"}
    assert percents["mio", HELD_OUT] == "34.0"
    assert percents["mio", TEST] == "44.0"
    assert percents["minc_clip", HELD_OUT] == "3.0"


def test_a_chosen_temperature_has_a_name_of_its_own(folder, tmp_path, capsys):
    tuned = compared("mio", [33.0, 34.0, 35.0], tuned="loss.temperature=0.2")
    write_table(folder / "mio_temperature/compare.csv", tuned)
    collect_study.main([str(folder), "--out", str(tmp_path / "study.csv")])
    assert "mio, temperature chosen  knn" in capsys.readouterr().out


def test_what_cannot_be_collected(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"collect_study: error: .* run scripts/tuned_study.sh first"):
        collect_study.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "study.csv")])
    write_table(folder / "mio/tune.csv", [{"config": "mio"}])
    with pytest.raises(SystemExit, match=r"tune\.csv has no column seed"):
        collect_study.main([str(folder), "--out", str(tmp_path / "study.csv")])
    assert not (tmp_path / "study.csv").exists()
