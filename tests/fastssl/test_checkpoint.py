import pytest
import torch

from fastssl.checkpoint import last_checkpoint, load_weights, prune, step_of
from fastssl.errors import ConfigError


def make(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_half_written_checkpoints_do_not_count(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None
    make(tmp_path, "step_00000009", "step_00000010", ".step_00000011.tmp")
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert step_of(last) == 10


def test_prune_keeps_the_last_and_every_kth(tmp_path):
    make(tmp_path, "step_00000010", "step_00000020", "step_00000025", "step_00000030", ".step_00000031.tmp")
    prune(tmp_path, keep_every_steps=20)
    assert names(tmp_path) == ["step_00000020", "step_00000030"]
    prune(tmp_path, keep_every_steps=0)
    assert names(tmp_path) == ["step_00000030"]


def test_weights_that_are_none_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no weights at"):
        load_weights(tmp_path)
    bad = tmp_path / "weights.pt"
    bad.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"weights.pt is no weights file"):
        load_weights(bad)
    torch.save({"state_dict": {}}, bad)
    with pytest.raises(ConfigError, match=r"weights.pt is no weights file"):
        load_weights(tmp_path)
