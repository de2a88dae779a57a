"""What is made of the encoder of a run on a URL."""

import json
from functools import partial
from pathlib import Path

import pytest

from fastssl.config import build_config
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.remote import RemoteStore
from pipelines.shards import sharded_images
from tests.helpers.fault_server import FaultServer
from tests.helpers.runs import TINY_MODEL, TINY_VIEWS, write_tiny_weights
from tests.helpers.shards import split


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory) -> Path:
    """The labelled digits in three shards."""
    return split(digits / "train.beton", tmp_path_factory.mktemp("shards") / "set")


def run_on(url: str, path: Path) -> RunFolder:
    """A run of no steps: a checkpoint of random weights."""
    data = {"train": url, "engine": "resident", "holdout_fraction": 0.2}
    cfg = build_config({"views": TINY_VIEWS, "model": TINY_MODEL, "data": data, "run": {"dir": str(path)}})
    folder = RunFolder(path)
    folder.create(cfg, 1)
    (checkpoint := folder.checkpoints / "step_00000005").mkdir(parents=True)
    write_tiny_weights(checkpoint / "weights.pt")
    return folder


def test_an_encoder_of_a_run_on_a_url_is_evaluated_and_exported(shards, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(sharded_images, "RemoteStore", partial(RemoteStore, first_wait_s=0.01))

    def card_of(run: Path, out: Path) -> str:
        done = in_process("export", run, out, "--format", "safetensors")
        assert done.returncode == 0, done.stderr
        return (out / "README.md").read_text()

    exported = {}
    with FaultServer(shards) as server:
        run = run_on(server.url, tmp_path / "run").path
        server.plan("x-00001-of-00003.beton", "503")
        found, settings = [], ["run.device=cpu", "eval.baselines=false"]
        for on in ([], ["--on", server.url]):
            done = in_process("eval", run, *on, "--what", "knn", "--json", "--set", *settings)
            assert done.returncode == 0, done.stderr
            found += json.loads(done.stdout)["rows"]
        assert [line["on"] for line in found] == [None, server.url]
        assert found == read_rows(run / "eval.jsonl")
        assert found[0]["top1"] == found[1]["top1"] > 0.2
        assert all(line["train"]["num_labelled"] + line["num_test_images"] == 1_297 for line in found)
        exported["there"] = card_of(run, tmp_path / "there")
    exported["gone"] = card_of(run, tmp_path / "gone")
    assert "Images: 1,297 from 127.0.0.1, 10 classes" in exported["there"]
    assert "Images: 127.0.0.1, which is not there any more" in exported["gone"]
