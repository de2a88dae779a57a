import json

import pytest
import torch

from fastssl.checkpoint.checksums import (
    MANIFEST,
    _digest,
    check_file,
    check_folder,
    save_file,
    sha256_of,
    write_manifest,
)
from fastssl.checkpoint.tensor_file import DamagedError
from fastssl.errors import ConfigError

FILES = ("state.pt", "rank_0.pt", "weights.pt")


@pytest.fixture
def folder(tmp_path):
    files = {name: save_file({"x": torch.arange(1000.0), "name": name}, tmp_path / name) for name in FILES}
    write_manifest(tmp_path, files, world_size=1)
    return tmp_path


def flip_bit(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def test_a_whole_one_passes_and_reads_as_it_was_saved(folder):
    check_folder(folder)
    entry = json.loads((folder / MANIFEST).read_text())["files"]["state.pt"]
    assert entry == {"bytes": (folder / "state.pt").stat().st_size, "sha256": sha256_of(folder / "state.pt")}
    assert torch.equal(torch.load(folder / "state.pt", weights_only=True)["x"], torch.arange(1000.0))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_damage_of_every_file_is_named(name, folder):
    path = folder / name
    content = path.read_bytes()
    for place in (0.0, 0.3, 0.6):
        flip_bit(path, place)
        with pytest.raises(DamagedError, match=name):
            check_folder(folder)
        path.write_bytes(content)
    for damaged in (content[: len(content) // 2], b"", content[:-1], content + content):
        path.write_bytes(damaged)
        with pytest.raises(DamagedError, match=name):
            check_folder(folder)
    path.unlink()
    with pytest.raises(DamagedError, match=name):
        check_folder(folder)
    path.write_bytes(content)
    check_folder(folder)


def test_one_file_is_checked_where_a_manifest_lies_beside_it(folder, tmp_path_factory):
    flip_bit(folder / "rank_0.pt", 0.5)
    check_file(folder / "weights.pt")
    flip_bit(folder / "weights.pt", 0.5)
    with pytest.raises(DamagedError, match=r"weights.pt is damaged"):
        check_file(folder / "weights.pt")
    (folder / MANIFEST).unlink()
    check_file(folder / "weights.pt")


def test_an_older_format_is_refused_and_not_taken_for_damage(folder):
    (folder / MANIFEST).unlink()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"older version of fastssl.*run.init_from") as refused:
        check_folder(folder)
    assert not isinstance(refused.value, DamagedError)


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr("fastssl.checkpoint.checksums.FORMAT_VERSION", 3)
    with pytest.raises(ConfigError, match="has format 2, this version of fastssl reads 3") as refused:
        check_folder(folder)
    assert not isinstance(refused.value, DamagedError)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": []},
        {"files": {"state.pt": None, "weights.pt": None, "rank_0.pt": None}},
        {"files": {name: {"bytes": 1, "sha256": ""} for name in ("state.pt", "weights.pt", "../rank_0.pt")}},
        {"world_size": -1},
        {"world_size": 10**30},
        {"world_size": "1"},
        {"format_version": None},
        {"run": {"id": 7}},
    ],
)
def test_a_manifest_of_something_else_is_damage(change, folder):
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256_of_the_above"]
    content |= change
    (folder / MANIFEST).write_text(json.dumps(content | {"sha256_of_the_above": _digest(content)}))
    with pytest.raises(DamagedError, match=r"manifest.json is damaged"):
        check_folder(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "null", "", "\0\xff", "[]"])
def test_what_is_no_manifest_is_damage(text, folder):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=r"manifest.json is damaged: it is not a manifest"):
        check_folder(folder)
