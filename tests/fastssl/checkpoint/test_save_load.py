from pathlib import Path

import pytest
import torch

from fastssl.checkpoint.checksums import save_file, write_manifest
from fastssl.checkpoint.save_load import (
    last_checkpoint,
    load_objective_state,
    load_weights,
    newest_whole,
    prune,
    step_of,
)
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


def test_prune_keeps_the_last_two_and_every_kth(tmp_path):
    make(tmp_path, "step_00000005", "step_00000020", "step_00000025", "step_00000030", ".step_00000031.tmp")
    prune(tmp_path, keep_every_steps=20)
    assert names(tmp_path) == ["step_00000020", "step_00000025", "step_00000030"]
    prune(tmp_path, keep_every_steps=0)
    assert names(tmp_path) == ["step_00000025", "step_00000030"]


def test_a_users_copy_is_left_alone(tmp_path):
    make(tmp_path, "step_00000005", "step_00000005_best", "step_00000020", "step_00000025")
    assert last_checkpoint(tmp_path) == tmp_path / "step_00000025"
    prune(tmp_path, keep_every_steps=20)
    assert names(tmp_path) == ["step_00000005_best", "step_00000020", "step_00000025"]


def test_a_full_disk_is_one_line():
    with pytest.raises(ConfigError, match=r"^/dev/full cannot be written \(No space left on device\): make room"):
        save_file({"x": torch.zeros(1 << 16)}, Path("/dev/full"))


def make_whole(root, step):
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    engine = {"parameters": {"model.w": torch.full((3,), float(step))}, "buffers": {"loss.moment": torch.ones(2)}}
    parts = {part: {} for part in ("backbone", "projector", "model")}
    contents = {"state.pt": {"engine": engine}, "weights.pt": {**parts, "image_px": step}, "rank_0.pt": {}}
    files = {name: save_file(content, folder / name) for name, content in contents.items()}
    write_manifest(folder, files, world_size=1)
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capfd):
    assert newest_whole(tmp_path) is None
    for step in (10, 20, 30):
        make_whole(tmp_path, step)
    assert newest_whole(tmp_path) == tmp_path / "step_00000030"
    assert capfd.readouterr().err == ""
    cut(tmp_path / "step_00000030/rank_0.pt")
    (tmp_path / "step_00000020/manifest.json").unlink()
    assert newest_whole(tmp_path) == tmp_path / "step_00000010"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "step_00000030/rank_0.pt is damaged" in lines[0]
    assert "step_00000020/manifest.json is missing" in lines[1]
    assert all("going on from step_00000010 instead" in line for line in lines)
    assert names(tmp_path) == ["damaged_step_00000020", "damaged_step_00000030", "step_00000010"]


def test_where_none_is_whole_nothing_is_moved_and_nothing_starts_anew(tmp_path):
    for step in (10, 20):
        cut(make_whole(tmp_path, step) / "state.pt")
    with pytest.raises(ConfigError, match=r"step_00000020/state.pt is damaged.*no older checkpoint is whole"):
        newest_whole(tmp_path)
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


def test_what_is_read_of_a_checkpoint_is_checked(tmp_path):
    folder = make_whole(tmp_path / "checkpoints", 10)
    for path in (tmp_path, folder):
        state = load_objective_state(path)
        assert state.keys() == {"model.w", "loss.moment"}
        assert torch.equal(state["model.w"], torch.full((3,), 10.0))
        assert load_weights(path)["image_px"] == 10
    for name, load in (("state.pt", load_objective_state), ("weights.pt", load_weights)):
        cut(folder / name)
        with pytest.raises(ConfigError, match=f"{name} is damaged"):
            load(tmp_path)
    with pytest.raises(ConfigError, match=r"manifest.json is missing"):
        load_objective_state(tmp_path / "none")


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
