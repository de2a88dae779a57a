"""Real trainings of seconds, in real processes, by every way to start one."""

import io
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.checkpoint.save_load import last_checkpoint, step_of
from fastssl.tracking.writers import read_rows
from pipelines.beton import BetonWriter
from tests.helpers.processes import ROOT, environment, free_port
from tests.helpers.runs import assert_same_end, final_state, losses

TRAIN = [sys.executable, "fastssl/train.py", "--cfg"]


def deepspeed(num_ranks: int) -> list[str]:
    return ["deepspeed", "--num_gpus", str(num_ranks), "--master_port", free_port(), "fastssl/train.py", "--cfg"]


def torchrun(num_ranks: int) -> list[str]:
    torch_run = [sys.executable, "-m", "torch.distributed.run"]
    return [*torch_run, f"--nproc_per_node={num_ranks}", f"--master_port={free_port()}", "fastssl/train.py", "--cfg"]


def run_of(config: Path) -> Path:
    return config.parent / "run"


def test_one_process_leaves_a_whole_run_folder_and_evaluates(tiny_config, command):
    done = command(*TRAIN, tiny_config)
    assert done.returncode == 0, done.stderr
    run = run_of(tiny_config)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "views.png", "curves.png", "tensorboard"):
        assert (run / name).exists(), name
    # One line an epoch when not a terminal; a slow machine has others that say how far it is.
    assert len(re.findall(r"^epoch [12]/2  loss ", done.stdout, re.MULTILINE)) == 2
    rows = losses(run)
    assert [row["step"] for row in rows if "kind" not in row] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert 0 < rows[-1]["online_top1"] <= 1
    assert 1 < rows[-1]["rankme_z"] <= 16
    assert rows[-1]["rankme_h"] > 1
    assert 0 < rows[-1]["std_z"] <= 1
    assert -1 <= rows[-1]["negative_similarity"] < rows[-1]["positive_similarity"] <= 1
    assert sum(rows[-1]["positive_counts"]) == 10 * 128  # of the last 2,048 images: the whole epoch
    assert rows[-1]["grad_norm"] > 0
    assert rows[-1]["skipped_steps"] == 0
    assert read_rows(run / "metrics.jsonl")[-1]["model_tflops_per_device"] > 0

    few = ["eval.linear_epochs=5", "eval.linear_lrs=[0.1]", "eval.num_seeds=1", "eval.num_draws=1"]
    table = command("fastssl", "eval", run, "--set", *few)
    assert table.returncode == 0, table.stderr
    names = {row["encoder"] for row in read_rows(run / "eval.jsonl")}
    assert names == {"raw pixels", "untrained encoder", "pre-trained encoder"}
    for name in names:
        assert name in table.stdout


@pytest.mark.slow
def test_a_run_is_not_overwritten_and_a_changed_config_is_named(tiny_config, command):
    assert command(*TRAIN, tiny_config, "--set", "train.num_epochs=1").returncode == 0
    again = command(*TRAIN, tiny_config, "--set", "train.num_epochs=1")
    assert again.returncode == 2
    assert "run.resume=auto" in again.stderr
    changed = command(*TRAIN, tiny_config, "--set", "train.num_epochs=3", "run.resume=auto")
    assert changed.returncode == 2
    assert "train.num_epochs: 1 -> 3" in changed.stderr
    complete = command(*TRAIN, tiny_config, "--set", "train.num_epochs=1", "run.resume=auto")
    assert complete.returncode == 0
    assert "is complete" in complete.stdout


@pytest.mark.slow
def test_engines_see_the_same_views_and_so_the_same_loss(tiny_config, command):
    first_loss = {}
    for engine in ("ffcv", "torch", "synthetic"):
        run = tiny_config.parent / engine
        done = command(*TRAIN, tiny_config, "--set", f"data.engine={engine}", f"run.dir={run}", "train.num_epochs=1")
        assert done.returncode == 0, done.stderr
        first_loss[engine] = losses(run)[0]["loss"]
    assert first_loss["ffcv"] == pytest.approx(first_loss["torch"], abs=2e-3)
    assert abs(first_loss["synthetic"] - first_loss["torch"]) > 2e-3


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar(tiny_config):
    import os
    import pty
    import termios

    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))  # of none at all some versions of tqdm make no bar
    arguments = [*TRAIN, str(tiny_config), "--set", "train.num_epochs=1"]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0
    os.close(leader)
    text = shown.decode(errors="replace")
    for part in ("10/10", "loss ", "img/s", "data wait", "step/s"):
        assert part in text, text
    assert "epoch 1/1" not in text


@pytest.mark.slow
def test_another_data_set_is_no_continuation(tiny_config, digits, command):
    settings = ["--set", "train.num_epochs=2", "data.global_batch_size=100"]
    copy = tiny_config.parent / "copy.beton"
    copy.write_bytes((digits / "train.beton").read_bytes())
    first = command(*TRAIN, tiny_config, *settings, f"data.train={copy}")
    assert first.returncode == 0, first.stderr
    copy.write_bytes((digits / "test.beton").read_bytes())
    other = command(*TRAIN, tiny_config, *settings, f"data.train={copy}", "run.resume=auto")
    assert other.returncode == 2
    assert "data.train" in other.stderr
    assert "1297" in other.stderr


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        (deepspeed, ["train.zero_stage=2"]),
        (torchrun, ["train.precision=bf16", "train.zero_stage=1"]),
    ],
    ids=["deepspeed-zero2", "torchrun-bf16-zero1"],
)
def test_two_ranks(launcher, settings, tiny_config, command):
    done = command(*launcher(2), tiny_config, "--set", *settings, "train.num_epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 x cpu" in done.stdout
    assert len([row for row in losses(run_of(tiny_config)) if "kind" not in row]) == 10


@pytest.mark.slow
@pytest.mark.dist
def test_without_batch_norm_two_ranks_take_the_steps_of_one(tiny_config, command):
    # A sum of gradients in the place of their mean, or one rank's negatives alone, would show in the second loss.
    vit = "model={backbone: timm/vit_tiny_patch16_224, projector_hidden: [], projector_last_norm: false,"
    vit += " backbone_kwargs: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}"
    settings = ["--set", vit, "train.num_epochs=1", "optim.base_lr=0.02"]
    found = {}
    for num_ranks, launcher in ((1, TRAIN), (2, deepspeed(2))):
        run = tiny_config.parent / f"ranks{num_ranks}"
        done = command(*launcher, tiny_config, *settings, f"run.dir={run}")
        assert done.returncode == 0, done.stdout + done.stderr
        found[num_ranks] = [row["loss"] for row in losses(run) if "kind" not in row]
    assert found[2][:4] == pytest.approx(found[1][:4], rel=1e-4)
    assert abs(found[1][3] - found[1][0]) > 1e-2  # the steps move


@pytest.mark.slow
def test_a_damaged_sample_is_replaced_and_counted_or_ends_the_run(tiny_config, tmp_path, command):
    rng, path = np.random.default_rng(0), tmp_path / "damaged.beton"
    with BetonWriter(path, 40) as writer:
        for i in range(40):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "JPEG")
            data = file.getvalue()
            stored = data[: len(data) // 2] if i == 7 else data
            writer.write_jpeg(stored, height_px=20, width_px=24, label=i % 3)
    settings = ["--set", f"data.train={path}", "data.test=null", "data.holdout_fraction=0", "data.global_batch_size=20"]
    done = command(*TRAIN, tiny_config, *settings, "data.max_bad_fraction=0.02")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "image 7 cannot be decoded" in done.stderr
    assert "data.max_bad_fraction=0.02" in done.stderr
    done = command(*TRAIN, tiny_config, *settings, "data.max_bad_fraction=0.03", f"run.dir={tmp_path / 'other'}")
    assert done.returncode == 0, done.stderr
    assert "image 7 cannot be decoded" in done.stderr
    epochs = [row for row in read_rows(tmp_path / "other" / "metrics.jsonl") if row.get("kind") == "epoch"]
    assert [row["bad_samples_seen"] for row in epochs] == [1, 1]


def test_a_diverged_run_keeps_its_last_good_checkpoint(tiny_config, forked):
    settings = ["--set", "run.checkpoint_every_steps=5", "run.log_every_steps=1000", "optim.base_lr=1e30"]
    done = forked("train", "--cfg", tiny_config, *settings)
    assert done.returncode == 3, done.stderr
    assert "the loss is" in done.stderr
    assert "6 steps in a row (train.max_skipped_steps is 5" in done.stderr
    assert last_checkpoint(run_of(tiny_config) / "checkpoints") is None  # nothing good was there to save
    skipped = read_rows(run_of(tiny_config) / "nonfinite.jsonl")
    assert [row["step"] for row in skipped] == [2, 3, 4, 5, 6, 7]
    assert all(len(set(row["sample_ids"])) == 128 for row in skipped)


def test_a_collapsed_representation_is_named_and_ends_the_run_where_it_shall(tiny_config, forked):
    """Projections on a line: there is nothing that a loss could do."""
    settings = ["--set", "model.projector_dim=1", "train.num_epochs=3", "train.on_collapse=stop"]
    done = forked("train", "--cfg", tiny_config, *settings)
    assert done.returncode == 3
    warning, error = done.stderr.splitlines()
    assert "the projections lie on a line (rankme_z 1, below 2 since epoch 1)" in warning
    assert error.startswith("fastssl: error: the representation has collapsed at step 20")
    rows = [row for row in losses(run_of(tiny_config)) if row.get("kind") == "epoch"]
    assert len(rows) == 2
    assert rows[-1]["rankme_z"] == pytest.approx(1)
    assert last_checkpoint(run_of(tiny_config) / "checkpoints") == run_of(tiny_config) / "checkpoints/step_00000010"


def test_checkpoints_of_another_run_are_not_taken_for_ones_own(tiny_config, forked):
    (run_of(tiny_config) / "checkpoints" / "step_00000900").mkdir(parents=True)
    done = forked("train", "--cfg", tiny_config)
    assert done.returncode == 2
    assert "config.yaml" in done.stderr


@pytest.mark.dist
@pytest.mark.parametrize(
    ("zero_stage", "num_ranks"), [(0, 1), pytest.param(1, 2, marks=pytest.mark.slow)], ids=["alone", "deepspeed-zero1"]
)
def test_killed_in_mid_epoch_and_with_a_damaged_checkpoint_it_ends_bit_for_bit_the_same(
    zero_stage, num_ranks, tiny_config, command, forked
):
    """Of the loss that remembers most; `test_random_kills.py` has the others, every stage and many more kills."""
    settings = ["--set", f"train.zero_stage={zero_stage}", "run.checkpoint_every_steps=3"]
    settings.append("loss={name: minc, target_momentum: 0.9}")
    whole, checkpoints = tiny_config.parent / "whole", run_of(tiny_config) / "checkpoints"
    launcher = TRAIN if num_ranks == 1 else deepspeed(num_ranks)
    train = partial(forked, "train", "--cfg") if num_ranks == 1 else partial(command, *launcher)
    done = train(tiny_config, *settings, f"run.dir={whole}")
    assert done.returncode == 0, done.stdout + done.stderr

    kill_after_step([*launcher, str(tiny_config), *settings], run_of(tiny_config), step=14)
    before, last = sorted(checkpoints.glob("step_*"))
    content = bytearray((last / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (last / "state.pt").write_bytes(content)
    resumed = train(tiny_config, *settings, "run.resume=auto")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed at step {step_of(before)} ->" in resumed.stdout
    assert f"{last}/state.pt is damaged" in resumed.stderr
    assert f"resuming from {before.name} instead" in resumed.stderr
    assert_same_end(whole, run_of(tiny_config))
    assert [name for name in final_state(whole) if "/target." in name]
    assert [name for name in final_state(whole) if "loss.moment." in name]


def kill_after_step(command: list[str], run: Path, *, step: int, device: str = "cpu") -> None:
    """Start a training and kill -9 all its processes once it has logged `step`."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(device),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_rows(run / "metrics.jsonl")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_session(process)
    assert last_checkpoint(run / "checkpoints") is not None


def kill_session(process: subprocess.Popen) -> None:
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=10)


@pytest.mark.slow
def test_init_from_takes_weights_only(tiny_config, command):
    assert command(*TRAIN, tiny_config, "--set", "train.num_epochs=1").returncode == 0
    second = tiny_config.parent / "second"
    settings = [
        f"run.init_from={run_of(tiny_config)}",
        f"run.dir={second}",
        "train.num_epochs=1",
        "optim.base_lr=1e-30",
    ]
    done = command(*TRAIN, tiny_config, "--set", *settings)
    assert done.returncode == 0, done.stderr
    first, after = (weights_of(run)["backbone"] for run in (run_of(tiny_config), second))
    assert torch.equal(first["conv1.weight"], after["conv1.weight"])  # no step is large enough to move what was taken
    assert next(row["step"] for row in losses(second)) == 1


def weights_of(run: Path) -> dict:
    folder = last_checkpoint(run / "checkpoints")
    assert folder is not None
    return torch.load(folder / "weights.pt", weights_only=True)
