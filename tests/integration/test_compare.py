"""`fastssl compare` on tiny runs: two losses, two seeds."""

import csv

import pytest

from fastssl.commands.compare import compare, summarise
from fastssl.errors import UserError
from fastssl.tracking.writers import read_rows
from tests.integration.test_bad_input import assert_one_line

FAST = ["--set", "train.num_epochs=1", "optim.warmup_epochs=0", "eval.baselines=false", "eval.what=[knn]"]


@pytest.fixture
def configs(tiny_config):
    text = tiny_config.read_text()
    minc = tiny_config.with_name("minc.yaml")
    minc.write_text(
        "".join(line for line in text.splitlines(keepends=True) if "loss:" not in line) + "loss: {name: minc}"
    )
    return [tiny_config.rename(tiny_config.with_name("mio.yaml")), minc]


def test_a_training_that_a_signal_ended_is_not_judged(tiny_config, tmp_path):
    """`true` stands for a training that was asked to leave and did: exit code 0, and a note in its folder."""
    run = tmp_path / "study/tiny/seed_0"
    run.mkdir(parents=True)
    (run / "preempted").write_text("it goes on after step 3")
    with pytest.raises(UserError, match="seed_0: a signal ended the training before its last epoch"):
        compare([tiny_config], tmp_path / "study", num_seeds=1, launcher="true")


@pytest.mark.slow
def test_configurations_under_seeds_become_a_table(tiny_config, tmp_path, command):
    out = tmp_path / "study"
    parts = [tmp_path / "mio.yaml", tmp_path / "minc.yaml"]
    for part in parts:
        part.write_text(f"loss: {{name: {part.stem}}}")
    compare = ["fastssl", "compare", *parts, "--base", tiny_config, "--seeds", "2", "--out", out, *FAST]
    done = command(*compare)
    assert done.returncode == 0, done.stderr
    assert "images held out of the training file" in done.stdout
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["config"], row["seed"], row["metric"]) for row in rows] == [
        ("mio", "0", "knn"), ("mio", "1", "knn"), ("minc", "0", "knn"), ("minc", "1", "knn"),
    ]  # fmt: skip
    assert all(0 < float(row["percent"]) <= 100 and "held out" in row["scored_on"] for row in rows)
    assert (out / "compare.png").exists()

    first = (out / "mio/seed_0/metrics.jsonl").read_text()
    again = command(*compare)  # everything is complete: nothing is trained or judged again
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is complete") == 4
    assert (out / "mio/seed_0/metrics.jsonl").read_text() == first
    assert len(read_rows(out / "mio/seed_0/eval.jsonl")) == 1


def test_the_summary_is_mean_deviation_and_interval_the_best_first():
    percents = {"a": (50.0, 52.0), "b": (61.0, 63.0)}
    rows = [
        {"config": config, "metric": metric, "percent": percent + shift}
        for metric, shift in (("knn", 0), ("linear", 10))
        for config, values in percents.items()
        for percent in values
    ]
    found = summarise(rows)
    assert [(row["metric"], row["config"]) for row in found] == [
        ("knn", "b"), ("knn", "a"), ("linear", "b"), ("linear", "a"),
    ]  # fmt: skip
    assert found[0]["mean_percent"] == 62
    assert found[0]["sd_over_seeds"] == pytest.approx(1.41, abs=0.01)
    assert found[0]["interval95_over_seeds"] == "49.29 to 74.71"  # t = 12.706 on one degree of freedom
    assert found[0]["num_seeds"] == 2


def test_what_cannot_be_compared(configs, tmp_path, in_process):
    def compare(*arguments):
        return in_process("compare", *arguments, "--out", tmp_path / "study")

    assert_one_line(compare(*configs, "--seeds", "0"), "--seeds")
    assert_one_line(compare(configs[0], configs[0]), "mio")
    assert_one_line(compare(configs[0], "/no/such.yaml"), "/no/such.yaml")
    assert_one_line(compare(*configs, "--set", "data.holdout_fraction=0"), "data.holdout_fraction")
    assert_one_line(compare(*configs, "--on-test", "--set", "data.test=null"), "data.test")
    other = configs[1].with_name("other.yaml")
    other.write_text(configs[1].read_text().replace("global_batch_size: 128", "global_batch_size: 64"))
    assert_one_line(compare(configs[0], other), "data.global_batch_size: 128 -> 64")
    assert not (tmp_path / "study").exists()
