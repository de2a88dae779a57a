"""`fastssl compare` on tiny runs: two losses, two seeds."""

import csv
import json
import sys

import pytest

from fastssl.commands.compare.compare_runs import compare, summarise
from fastssl.errors import UserError
from fastssl.tracking.run_folder import RunFolder
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
@pytest.mark.timeout(900)
def test_configurations_under_seeds_become_a_table(tiny_config, tmp_path, command):
    out = tmp_path / "study"
    parts = [tmp_path / "mio.yaml", tmp_path / "minc.yaml"]
    for part in parts:
        part.write_text(f"loss: {{name: {part.stem}}}")
    compare = ["fastssl", "compare", *parts, "--base", tiny_config, "--seeds", "2", "--out", out, *FAST]
    done = command(*compare, timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert "held-out images of the training file" in done.stdout
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["config"], row["seed"], row["metric"]) for row in rows] == [
        ("mio", "0", "knn"), ("mio", "1", "knn"), ("minc", "0", "knn"), ("minc", "1", "knn"),
    ]  # fmt: skip
    assert all(0 < float(row["percent"]) <= 100 and "held out" in row["scored_on"] for row in rows)
    assert (out / "compare.png").exists()

    first = (out / "mio/seed_0/metrics.jsonl").read_text()
    again = command(*compare, "--json")  # everything is complete: nothing is trained or judged again
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is complete") == 4
    exact = json.loads(again.stdout)["rows"]
    assert {row["config"]: round(row["mean_percent"], 6) for row in exact} == {
        name: round(sum(float(row["percent"]) for row in rows if row["config"] == name) / 2, 6)
        for name in ("mio", "minc")
    }
    assert (out / "mio/seed_0/metrics.jsonl").read_text() == first
    assert len(read_rows(out / "mio/seed_0/eval.jsonl")) == 1


def test_the_summary_is_mean_deviation_and_interval_the_best_first():
    percents = {"a": (50.0, 52.0), "b": (61.0, 63.0)}
    rows = [
        {"config": config, "metric": metric, "seed": seed, "percent": percent + shift}
        for metric, shift in (("knn", 0), ("linear", 10))
        for config, values in percents.items()
        for seed, percent in enumerate(values)
    ]
    found = summarise(rows)
    assert [(row["metric"], row["config"]) for row in found] == [
        ("knn", "b"), ("knn", "a"), ("linear", "b"), ("linear", "a"),
    ]  # fmt: skip
    assert found[0]["mean_percent"] == 62
    assert found[0]["sd_over_seeds"] == pytest.approx(1.41, abs=0.01)
    assert found[0]["interval95_over_seeds"] == "49.29 to 74.71"  # t = 12.706 on one degree of freedom
    assert found[0]["num_seeds"] == 2
    assert (found[0]["difference_to_best"], found[0]["difference_se"]) == (None, None)


def test_differences_are_paired_by_seed():
    """Seeds differ far more than configurations: the standard error is that of the differences -3, -1 and -2."""
    percents = {"a": (37.0, 59.0, 78.0), "b": (40.0, 60.0, 80.0)}
    rows = [
        {"config": config, "metric": "knn", "seed": seed, "percent": percent}
        for config, values in percents.items()
        for seed, percent in enumerate(values)
    ]
    worse = summarise(rows)[1]
    assert worse["config"] == "a"
    assert worse["difference_to_best"] == -2
    assert worse["difference_se"] == pytest.approx(1 / 3**0.5, abs=0.005)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_with_a_value_tuned_for_each_point(tiny_config, tmp_path, command):
    out = tmp_path / "study"
    again = ["fastssl", "compare", tiny_config, "--out", out, "--seeds", "1", "--jobs", "2", *FAST]
    again += ["--sweep", "data.global_batch_size=32,64", "--tune", "optim.base_lr=1e-3,.5"]
    done = command(*again, timeout_s=600)
    assert done.returncode == 0, done.stderr
    with (out / "tune.csv").open(newline="") as file:
        tried = list(csv.DictReader(file))
    points = ["tiny global_batch_size=32", "tiny global_batch_size=64"]
    lrs = ["optim.base_lr=0.001", "optim.base_lr=0.5"]
    assert [(row["config"], row["tuned"]) for row in tried] == [(point, lr) for point in points for lr in lrs]
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["config"], row["seed"]) for row in rows] == [(point, "0") for point in points]
    for row in rows:
        best = max((line for line in tried if line["config"] == row["config"]), key=lambda line: float(line["percent"]))
        assert row["tuned"] == best["tuned"]
    run = out / "tiny/data.global_batch_size=32/tune/optim.base_lr=0.001"
    cfg = RunFolder(run).load_config(())
    assert (cfg.data.global_batch_size, cfg.optim.base_lr, cfg.run.seed) == (32, 1e-3, 1000)
    assert "images" in run.with_name(f"{run.name}.log").read_text()
    before = (run / "metrics.jsonl").read_text()
    assert command(*again).returncode == 0
    assert (run / "metrics.jsonl").read_text() == before


def test_a_failure_ends_the_runs_that_are_under_way(tiny_config, tmp_path):
    """The launcher fails for one seed and would wait for ever with the other."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import pathlib, sys, time\n"
        "waits = pathlib.Path(__file__).with_name('waits')\n"
        "if 'run.seed=1' in sys.argv:\n"
        "    waits.touch()\n"
        "    time.sleep(1000)\n"
        "while not waits.exists():\n"
        "    time.sleep(0.01)\n"
        "sys.exit('no such device')\n"
    )
    with pytest.raises(UserError, match=r"seed_0: the training ended with exit code 1; its message is in .*seed_0.log"):
        compare([tiny_config], tmp_path / "study", num_seeds=2, num_jobs=2, launcher=f"{sys.executable} {launcher}")
    assert (tmp_path / "study/tiny/seed_0.log").read_text() == "no such device\n"


def test_what_cannot_be_compared(configs, tmp_path, in_process):
    def compare(*arguments):
        return in_process("compare", *arguments, "--out", tmp_path / "study")

    assert_one_line(compare(*configs, "--seeds", "0"), "--seeds")
    assert_one_line(compare(*configs, "--jobs", "0"), "--jobs")
    assert_one_line(compare(*configs, "--sweep", "optim.base_lr=.1"), "--sweep takes key=value,value,...")
    assert_one_line(compare(*configs, "--sweep", "optim.base_lr=.1,[.2"), "--sweep")
    assert_one_line(compare(*configs, "--tune", "optim.rate=.1,.2"), "rate")
    assert_one_line(compare(*configs, "--tune", "optim.base_lr=.1,-1"), "base_lr")
    assert_one_line(
        compare(*configs, "--tune", "optim.base_lr=.1,1", "--tune-on", "knnn"), "--tune-on must be one of knn"
    )
    assert_one_line(compare(configs[0], configs[0]), "mio")
    assert_one_line(compare(configs[0], "/no/such.yaml"), "/no/such.yaml")
    assert_one_line(compare(*configs, "--set", "data.holdout_fraction=0"), "data.holdout_fraction")
    assert_one_line(compare(*configs, "--on-test", "--set", "data.test=null"), "data.test")
    other = configs[1].with_name("other.yaml")
    other.write_text(configs[1].read_text().replace("global_batch_size: 128", "global_batch_size: 64"))
    assert_one_line(compare(configs[0], other), "data.global_batch_size: 128 -> 64")
    assert not (tmp_path / "study").exists()
