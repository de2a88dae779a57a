"""A folder as a store of files."""

import os

import pytest

from pipelines.errors import DataError
from pipelines.shards.store import LocalStore


@pytest.fixture
def store(tmp_path) -> LocalStore:
    (tmp_path / "a.beton").write_bytes(b"0123456789")
    (tmp_path / ".hidden.beton").write_bytes(b"x")
    (tmp_path / "sub.beton").mkdir()
    (tmp_path / "gone.beton").symlink_to(tmp_path / "nothing")
    return LocalStore(tmp_path)


def test_reads(store, tmp_path):
    assert store.get("a.beton", 2, 5) == b"234"
    assert store.get_whole("a.beton", 10) == (b"0123456789", None)
    found = sorted((info.path, info.num_bytes, info.etag) for info in store.list(".beton"))
    assert found == [("a.beton", 10, None), ("gone.beton", 0, None)]
    assert store.list(".rows") == []
    assert store.info("a.beton") == next(info for info in store.list() if info.path == "a.beton")
    assert store.info("b.beton") is None
    assert store.shown == str(tmp_path)


def test_writes_whole_files_and_leaves_nothing_else(store, tmp_path):
    assert store.put("b", b"new")
    assert store.put("b", b"newer")
    assert not store.put("b", b"newest", create_only=True)
    assert store.put("c", b"new", create_only=True)
    assert (tmp_path / "b").read_bytes() == b"newer"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]


def test_what_cannot_be_read_or_written_is_one_line(store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for call, reason in (
        (lambda: LocalStore(tmp_path / "none"), "none: no such folder"),
        (lambda: store.get("none", 0, 1), "none: cannot be read"),
        (lambda: store.get("a.beton", 5, 11), "a.beton: was cut short while it was read"),
        (lambda: store.get("pipe", 0, 1), "pipe: cannot be read"),
        (lambda: store.get_whole("none", 1), "none: cannot be read"),
        (lambda: store.get_whole("a.beton", 9), "a.beton: more than 9 bytes"),
        (lambda: store.put("sub.beton", b"x"), "sub.beton: cannot be written"),
        (lambda: store.put("none/x", b"x"), "x: cannot be written"),
    ):
        with pytest.raises(DataError) as caught:
            call()
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]
