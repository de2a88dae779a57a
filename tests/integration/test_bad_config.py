"""Configurations that are nonsense, broken or made to do harm: one line that names file or key, and exit code 2."""

import os
import subprocess
import sys

import pytest

from fastssl.cli import main
from tests.helpers.fuzz import limits
from tests.helpers.processes import ROOT, environment
from tests.integration.test_bad_input import assert_one_line

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{of}'] * 10)}]\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "alias bomb": (BOMB.encode(), "values, with aliases expanded"),
    "20,000 keys": ("".join(f"k{i}: 1\n" for i in range(20_000)).encode(), "more than 10,000 values"),
    "circular alias": (b"run: &a {dir: *a}", "nested more than 32 levels"),
    "deep list": (b"run: " + b"[" * 10_000 + b"]" * 10_000, "nested more than 32 levels"),
    "deep block": (b"- " * 10_000, "nested more than 32 levels"),
    "equal keys": (b"run: {seed: 1}\ntrain: {}\nrun: {seed: 2}", "line 3: the key run stands twice"),
    "number as key": (b"run:\n  1: 2", "line 2: a key must be text, not of type int"),
    "merge key": (b"a: &a {seed: 1}\nrun: {<<: *a}", "line 2: a key must be text, not of type merge"),
    "two documents": (b"run: {}\n---\nrun: {}", "line 2"),
    "empty": (b"", "must hold a mapping"),
    "python object": (b"run: !!python/name:os.system", "line 1: a value of type python/name:os.system"),
    "date": (b"run:\n  dir: 2024-01-01", "line 2: a value of type timestamp"),
    "bytes": (b"run: {dir: !!binary aGk=}", "a value of type binary"),
    "long integer": (b"run: {seed: " + b"9" * 5000 + b"}", "5,000 characters"),
    "infinity": (b"optim: {base_lr: .inf}", ".inf is not a number"),
    "NUL": (b"run: {dir: a\0b}", "line 1: a character U+0000"),
    "escaped NUL": (b'run: {dir: "a\\0b"}', "control characters"),
    "Latin-1": ("# é\nrun: {dir: é}".encode("latin-1"), "line 1 is not UTF-8"),
    "UTF-16": ("run: {seed: 1}".encode("utf-16"), "not UTF-8"),
    "long text": (b"run: {dir: " + b"x" * 500_000 + b"}", "500,000 characters is too long"),
    "long key": (b"run: {" + b"x" * 1000 + b": 1}", "unknown key run.xxx"),
    "syntax": (b"run:\n  seed: [1", "line 2"),
}
VALUES = {
    "train.num_epochs": ["1000000000000", '"10"', "true", "10.5", "[1]", "0", "1e1000"],
    "run.seed": ["true", "-1", "9223372036854775808", "1.5"],
    "run.num_threads": ["1000000", "-1"],
    "data.prefetch_batches": ["1000000000", "0"],
    "model.projector_dim": ["10000000"],
    "model.projector_hidden": ["[10000000]", "[1.5]", "512"],
    "loss.temperature_positive": ["1e-300", '"0.1"', "true"],
    "optim.betas": ["[0.9]", "[0.9, 1.0]", "0.9"],
    "train.zero_stage": ["true", "7"],
    "train.compile": ["1", '"yes"'],
    "eval.knn_k": ["0", "[1, 0]", "[]", "true"],
    "eval.what": ["[knn, knm]", "[]"],
    "views.override": ["{flip: 1}", "3"],
    "views.size_px": ["1000000"],
    "custom": ["{model: 3}"],
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path, tiny_config, in_process):
    content, part = FILES[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with limits(seconds=20, memory_mb=1000):
        done = in_process("train", "--cfg", path)
        recipe = in_process("train", "--cfg", tiny_config, "--set", f"views.recipe={path}")
    assert_one_line(done, part)
    assert_one_line(recipe, str(path))
    assert len(done.stderr) < 1200


def test_what_is_no_file(tmp_path, in_process):
    os.mkfifo(tmp_path / "fifo")
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(2**30)
    with limits(seconds=20, memory_mb=1000):
        for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
            assert_one_line(in_process("train", "--cfg", path), f"cannot read the config {path}: not a regular file")
        assert_one_line(
            in_process("train", "--cfg", large), "large.yaml: 1,073,741,824 bytes; at most 1,048,576 are read"
        )


def test_words_that_are_no_utf_8(tiny_config):
    command = [sys.executable, "fastssl/train.py", "--cfg", tiny_config, "--set"]
    words = [*command, b"run.dir=a\xff"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert_one_line(done, "--set run.dir is not YAML")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "unknown command trian: did you mean train"),
        (["train", "--cgf", "x"], "unknown argument --cgf: did you mean --cfg"),
        (["train", "--cfg", "x", "--ste=y"], "unknown argument --ste: did you mean --set"),
        (["convert", "--from", "foldr", "a", "b"], "not foldr: did you mean folder?"),
        (["verify", "a", "b"], "unknown argument b"),
        ([], "required: COMMAND"),
    ],
    ids=" ".join,
)
def test_words_that_the_command_does_not_know(words, part, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert_one_line(subprocess.CompletedProcess(words, ended.value.code, *capsys.readouterr()), part)  # pyright: ignore


@pytest.mark.parametrize("key", VALUES)
def test_values(key, tiny_config, in_process):
    for value in VALUES[key]:
        done = in_process("train", "--cfg", tiny_config, "--set", f"{key}={value}")
        assert_one_line(done, key)
        assert len(done.stderr) < 1200
