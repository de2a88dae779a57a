import json
import os
import resource
import shutil
import struct
import zipfile
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
    set_aside,
    step_of,
)
from fastssl.config import build_config
from fastssl.errors import ConfigError
from fastssl.tracking.run_folder import RunFolder


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
    with pytest.raises(ConfigError, match=r"^/dev/full cannot be written \(No space left on device\): free space"):
        save_file({"x": torch.zeros(1 << 16)}, Path("/dev/full"))


def make_whole(root, step, run=None):
    folder = root / f"step_{step:08d}"
    folder.mkdir(parents=True)
    engine = {"parameters": {"model.w": torch.full((3,), float(step))}, "buffers": {"loss.moment": torch.ones(2)}}
    parts = {part: {} for part in ("backbone", "projector", "model")}
    contents = {"state.pt": {"engine": engine}, "weights.pt": {**parts, "image_px": step}, "rank_0.pt": {}}
    files = {name: save_file(content, folder / name) for name, content in contents.items()}
    write_manifest(folder, files, world_size=1, run=run)
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capfd):
    assert newest_whole(tmp_path, {}) is None
    for step in (10, 20, 30):
        make_whole(tmp_path, step)
    assert newest_whole(tmp_path, {}) == tmp_path / "step_00000030"
    cut(tmp_path / "step_00000030/rank_0.pt")
    (tmp_path / "step_00000020/manifest.json").unlink()
    damage = {}
    assert newest_whole(tmp_path, damage) == tmp_path / "step_00000010"
    assert capfd.readouterr().err == ""
    assert names(tmp_path) == ["step_00000010", "step_00000020", "step_00000030"]
    set_aside(damage, tmp_path / "step_00000010")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "step_00000030/rank_0.pt is damaged" in lines[0]
    assert "step_00000020/manifest.json is missing" in lines[1]
    assert all("resuming from step_00000010 instead" in line for line in lines)
    assert names(tmp_path) == ["damaged_step_00000020", "damaged_step_00000030", "step_00000010"]


def test_where_none_is_whole_nothing_is_moved_and_nothing_starts_again(tmp_path):
    for step in (10, 20):
        cut(make_whole(tmp_path, step) / "state.pt")
    with pytest.raises(ConfigError, match=r"step_00000020/state.pt is damaged.*no older checkpoint is whole"):
        newest_whole(tmp_path, {})
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
    with pytest.raises(ConfigError, match=r"weights.pt is not a file of fastssl"):
        load_weights(bad)
    torch.save({"state_dict": {}}, bad)
    with pytest.raises(ConfigError, match=r"weights.pt is not a file of fastssl"):
        load_weights(tmp_path)


def make_run(path):
    """A run with one checkpoint."""
    folder = RunFolder(path)
    folder.create(build_config({}), world_size=1)
    make_whole(folder.checkpoints, 10, folder.identity())
    return folder


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    copied = second.checkpoints / "step_00000020"
    shutil.copytree(first.checkpoints / "step_00000010", copied)
    reason = rf"{copied} is a checkpoint of another run \(\w+\) than {second.path} \(\w+\): move it out"
    for read in (lambda: newest_whole(second.checkpoints, {}), lambda: load_weights(second.path)):
        with pytest.raises(ConfigError, match=reason):
            read()
    for path in (second.path, copied):
        with pytest.raises(ConfigError, match=reason):
            load_objective_state(path)
    shutil.move(copied, tmp_path / "elsewhere")
    assert load_weights(tmp_path / "elsewhere")["image_px"] == 10
    assert newest_whole(second.checkpoints, {}) == second.checkpoints / "step_00000010"


def test_a_run_that_is_copied_or_renamed_stays_itself(tmp_path):
    run = make_run(tmp_path / "run")
    shutil.copytree(run.path, tmp_path / "copy")
    shutil.move(run.path, tmp_path / "renamed")
    for name in ("copy", "renamed"):
        moved = RunFolder(tmp_path / name)
        assert newest_whole(moved.checkpoints, {}) == moved.checkpoints / "step_00000010"
        assert load_weights(moved.path)["image_px"] == 10


def test_another_model_section_is_refused_and_another_path_is_not(tmp_path):
    run = make_run(tmp_path / "run")
    text = run.config.read_text()
    run.config.write_text(text.replace("engine: ffcv", "engine: torch"))
    assert load_weights(run.path)["image_px"] == 10
    run.config.write_text(text.replace("projector_dim: 128", "projector_dim: 64"))
    with pytest.raises(ConfigError, match=r"other model, loss, optim or custom sections than .*yaml has now"):
        load_weights(run.path)


def test_runs_and_checkpoints_without_an_id_are_taken(tmp_path):
    run = make_run(tmp_path / "run")
    make_whole(run.checkpoints, 20)
    assert newest_whole(run.checkpoints, {}) == run.checkpoints / "step_00000020"
    shutil.rmtree(run.checkpoints / "step_00000020")
    run.id_file.unlink()
    assert run.identity() is None
    assert newest_whole(run.checkpoints, {}) == run.checkpoints / "step_00000010"
    run.id_file.write_text("[]")
    with pytest.raises(ConfigError, match=r"run.json is damaged: restore it, or delete it"):
        newest_whole(run.checkpoints, {})


def test_weights_that_claim_more_than_they_hold_are_refused(tmp_path):
    """Zeros that are compressed to a thousandth, and a tensor of a terabyte in a file of a kilobyte."""
    file = tmp_path / "weights.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", bytes(1 << 28))
    assert file.stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"weights.pt is not a file of fastssl.* compressed"):
        load_weights(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB
    claimed, true = struct.pack("<q", 1 << 40), struct.pack("<H", 1000)
    torch.save({"backbone": {"w": torch.ones(1000)}}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(file, "w") as archive:
        for part in whole.infolist():
            data = whole.read(part).replace(b"M" + true, b"\x8a\x08" + claimed)
            archive.writestr(part.filename, data)
    with pytest.raises(ConfigError, match=r"weights.pt is not a file of fastssl"):
        load_weights(file)


def test_a_flipped_bit_in_weights_without_a_manifest_is_found(tmp_path):
    file = tmp_path / "weights.pt"
    parts = {"backbone": {"w": torch.ones(1000)}, "projector": {}, "model": {}, "image_px": 8}
    torch.save(parts, file)
    assert torch.equal(load_weights(file)["backbone"]["w"], torch.ones(1000))
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(1000).numpy().tobytes()) + 77] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"weights.pt is damaged: the CRC-32"):
        load_weights(file)


@pytest.mark.parametrize("wrong", [{"backbone": []}, {"projector": {1: 2}}, {"model": None}, {"image_px": 1 << 40}])
def test_parts_of_weights_that_are_none_are_named(wrong, tmp_path):
    parts = {"backbone": {}, "projector": {}, "model": {}, "image_px": 8}
    torch.save(parts | wrong, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"weights.pt is not a file of fastssl"):
        load_weights(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    folder = make_whole(tmp_path / "checkpoints", 10)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "state.pt").unlink()
    os.mkfifo(folder / "state.pt")
    write_manifest(folder, files | {"state.pt": files["state.pt"] | {"bytes": 0}}, world_size=1)
    with pytest.raises(ConfigError, match=r"state\.pt cannot be read .not a regular file"):
        load_objective_state(folder)
    (folder / "weights.pt").unlink()
    os.mkfifo(folder / "weights.pt")
    with pytest.raises(ConfigError, match="no weights at"):
        load_weights(folder)
