"""Bad input gets one line on stderr and exit code 2, never a traceback."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from fastssl.checkpoint.save_load import load_weights
from fastssl.errors import ConfigError


def assert_one_line(done, *parts):
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fastssl: error")
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["optim.bse_lr=1"], ["unknown key optim.bse_lr", "base_lr"]),
        (["train.num_epochs=1", "optim.warmup_epochs=10"], ["optim.warmup_epochs", "train.num_epochs"]),
        (["run.seed=-1"], ["run.seed"]),
        (["data.global_batch_size=1"], ["data.global_batch_size"]),
        (["data.window_mb=0"], ["data.window_mb"]),
        (["data.order=shuffled"], ["data.order", "quasi_random"]),
        (["optim.base_lr=.nan"], ["optim.base_lr"]),
        (["optim.name=larss"], ["optim.name", "'larss'", "lars", "lamb"]),
        (["optim={name: lamb, impl: apex}", "train.zero_stage=2"], ["train.zero_stage", "optim.impl", "optim.name"]),
        (["optim={name: lars, impl: apex}"], ["optim.impl", "optim.name=lars"]),
        (["optim={name: lars, lars_trust_coefficient: 0}"], ["optim.lars_trust_coefficient"]),
        (["loss.name=nope"], ["loss.name", "mio, siglip, simclr"]),
        (["loss={name: byol, target_momentum: 2}"], ["loss.target_momentum", "[0, 1]"]),
        (["train.num_micro_batches=0"], ["train.num_micro_batches", "[1, 65536]"]),
        (["model.batch_norm=global"], ["model.batch_norm", "per_rank", "sync"]),
        (["model.activation_checkpointing=often"], ["model.activation_checkpointing", "often"]),
        (["train.compile=maybe"], ["train.compile", "maybe"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_a_config_cannot_say(settings, parts, tiny_config, in_process):
    assert_one_line(in_process("train", "--cfg", tiny_config, "--set", *settings), *parts)
    assert not (tiny_config.parent / "run").exists()  # nothing is left behind


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["data.train=/no/such.beton"], ["/no/such.beton"]),
        (["data.train="], ["data.train"]),
        (["data.global_batch_size=4096"], ["data.global_batch_size", "4096", "1297"]),
        (["run.device=cuda"], ["run.device", "GPU"]),
        (["model.backbone=resnet81"], ["model.backbone", "resnet18"]),
        (["run.init_from=/no/such/run"], ["/no/such/run"]),
        (["data.test=/no/such.beton"], ["/no/such.beton"]),
        (["run.dir=/dev/null/x"], ["run.dir", "/dev/null"]),
        (["train.num_micro_batches=5"], ["train.num_micro_batches is 5", "local batch of 128 images"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_train(settings, parts, tiny_config, forked):
    import torch

    if settings == ["run.device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert_one_line(forked("train", "--cfg", tiny_config, "--set", *settings), *parts)
    assert not (tiny_config.parent / "run").exists()


@pytest.mark.parametrize("key", ["optim.impl", "model.layer_norm"])
def test_apex_where_it_cannot_serve(key, tiny_config, in_process):
    from fastssl.optim.nvidia_apex import why_no_apex

    reason = "NVIDIA/apex" if why_no_apex() else "need a GPU"
    done = in_process("train", "--cfg", tiny_config, "--set", f"{key}=apex", "run.device=cpu")
    assert_one_line(done, f"{key}=apex", reason)
    assert not (tiny_config.parent / "run").exists()


def test_train_on_broken_files(tiny_config, digits, tmp_path, command, forked):
    cut = tmp_path / "cut.beton"
    cut.write_bytes((digits / "train.beton").read_bytes()[:-5000])
    train = [sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set"]
    assert_one_line(command(*train, f"data.train={cut}"), str(cut), "truncated")
    text = tmp_path / "text.beton"
    text.write_text("not a beton " * 1000)
    assert_one_line(forked("train", "--cfg", tiny_config, "--set", f"data.train={text}"), str(text))


def test_missing_config(in_process):
    assert_one_line(in_process("train", "--cfg", "/no/such.yaml"), "/no/such.yaml")


BAD_PATHS = {"a\0b": "NUL", f"{'x' * 300}/y": "300 bytes", "a/" * 3000: "more than 4095", "caf\udce9": "UTF-8"}


@pytest.mark.parametrize("path", BAD_PATHS, ids=["nul", "long_name", "long_path", "not_utf8"])
def test_paths_that_no_file_can_have(path, tiny_config, tmp_path, in_process):
    arguments = [["train", "--cfg"], ["eval"], ["hessian"], ["inspect"], ["verify"], ["convert", "--from", "folder"]]
    for each in arguments:
        out = [tmp_path / "x.beton"] if each[0] == "convert" else []
        assert_one_line(in_process(*each, path, *out), BAD_PATHS[path])
    train = ["train", "--cfg", tiny_config, "--set"]
    for key in ("run.dir", "data.train", "data.test", "run.init_from"):
        assert_one_line(in_process(*train, f"{key}={json.dumps(path)}"), key)
    assert_one_line(in_process(*train, f"views.recipe={json.dumps(f'{path}/x.yaml')}"))
    with pytest.raises(ConfigError, match=rf"no weights at .*{BAD_PATHS[path]}"):
        load_weights(path)


def test_a_limit_of_open_files(command):
    done = command("bash", "-c", "ulimit -n 24; fastssl verify no.beton")
    assert_one_line(done, "may open only 24 files, at least 64 are needed: ulimit -n 65536")
    assert_one_line(command("bash", "-c", "ulimit -S -n 24; fastssl verify no.beton"), "no.beton: no such file")


def test_convert(tmp_path, in_process):
    (tmp_path / "empty").mkdir()
    convert = ["convert", "--from", "folder"]
    assert_one_line(in_process(*convert, tmp_path / "empty", tmp_path / "x.beton"), str(tmp_path / "empty"))
    images = tmp_path / "images" / "a"
    images.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(images / "good.jpg")
    bad = images / "bad.jpg"
    bad.write_bytes((images / "good.jpg").read_bytes()[:300])
    failed = in_process(*convert, tmp_path / "images", tmp_path / "x.beton", "--on-error", "fail")
    assert_one_line(failed, str(bad))
    assert not list(tmp_path.glob("x.beton*"))
    failed = in_process("convert", tmp_path / "images", tmp_path / "x.beton", "--max-bad", "0.4")
    assert_one_line(
        failed, "1 of the first 1 images are corrupt, more than --max-bad 0.4 of all 2: 1 truncated", "(bad.jpg)"
    )
    assert not (tmp_path / "x.beton").exists()

    skipped = in_process(*convert, tmp_path / "images", tmp_path / "x.beton", "--on-error", "skip")
    assert skipped.returncode == 0, skipped.stderr
    inspected = in_process("inspect", tmp_path / "x.beton", "--out", tmp_path / "sheet.png")
    assert inspected.returncode == 0, inspected.stderr
    assert (tmp_path / "sheet.png").exists()


def test_convert_options(tmp_path, digits, in_process):
    convert = ["convert", "--from"]
    out = tmp_path / "x.beton"
    for arguments, part in (
        (["digits", out, "--shard", "0"], "--shard needs --shards"),
        (["digits", out, "--shards", "2", "--shard", "2"], "shard must be 0..1"),
        (["webdataset", tmp_path / "no.tar", out], "no.tar: no such files"),
        (["torchvision", "CIFAR10", out], "root: torchvision needs"),
        (["digits", out, "--max-bad", "1.5"], "max_bad must be a fraction in 0..1"),
        (["digits", out, "--max-bad", "1", "--on-error", "skip"], "max_bad and on_error exclude each other"),
    ):
        assert_one_line(in_process(*convert, *arguments), part)
    for arguments, part in (
        ([out], "--from is missing"),
        (["CIFAR10", out], "CIFAR10: no such file or folder"),
        ([digits / "train.beton", out], "is a .beton file already"),
    ):
        assert_one_line(in_process("convert", *arguments), part)
    assert not list(tmp_path.iterdir())


def test_verify(tmp_path, digits, in_process):
    done = in_process("verify", digits / "test.beton")
    assert done.returncode == 0, done.stderr
    assert "whole; 500 images (0 JPEG, 500 raw)" in done.stdout
    content = bytearray((digits / "test.beton").read_bytes())
    content[-20_000] ^= 1  # the allocation table takes 12,000
    (tmp_path / "x.beton").write_bytes(content)
    (tmp_path / "x.beton.json").write_bytes((digits / "test.beton.json").read_bytes())
    assert_one_line(in_process("verify", tmp_path / "x.beton"), "x.beton", "checksum")


@pytest.mark.slow
def test_files_that_do_not_belong_together(tiny_config, digits, tmp_path, command):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "unlabelled.npz", x=pixels)
    unlabelled = tmp_path / "unlabelled.beton"
    done = command("fastssl", "convert", "--from", "npz", tmp_path / "unlabelled.npz", unlabelled)
    assert done.returncode == 0, done.stderr
    train = [sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set", "train.num_epochs=1"]
    assert_one_line(command(*train, f"data.test={unlabelled}"), "data.test", "labels")

    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(pixels[0]).save(tmp_path / "photos" / name / "1.png")
    other = tmp_path / "other.beton"
    assert command("fastssl", "convert", tmp_path / "photos", other, "--labels", "folders").returncode == 0
    assert_one_line(command(*train, f"data.test={other}"), "data.test", "classes")

    # Without labels a run trains, and only its evaluation has nothing to say.
    done = command(*train, f"data.train={unlabelled}", "data.test=null", "data.global_batch_size=100")
    assert done.returncode == 0, done.stderr
    assert "online" not in done.stdout
    assert_one_line(command("fastssl", "eval", tmp_path / "run"), str(unlabelled), "fewer than two classes with labels")


def test_eval_without_a_run(tmp_path, in_process):
    assert_one_line(in_process("eval", tmp_path), str(tmp_path))


def test_views(digits, tmp_path, in_process):
    beton = digits / "train.beton"
    assert_one_line(in_process("views", "/no/such.beton"), "/no/such.beton")
    assert_one_line(in_process("views", beton, "--recipe", "nope"), "views.recipe", "byol")
    assert_one_line(in_process("views", beton, "--num", "1"), "--num", "1")
    assert_one_line(in_process("views", beton, "--out", "/no/such/grid.png"), "/no/such/grid.png")
    out = tmp_path / "grid.png"
    done = in_process("views", beton, "--recipe", "multicrop", "--num", "5", "--out", out)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as grid:
        assert grid.size == (5 * (224 + 4), 2 * (224 + 4) + 6 * (96 + 4))
