"""Sidecars that `fastssl convert` did not write."""

import json

import pytest

from pipelines.beton import BetonWriter
from pipelines.beton.sidecar import MAX_SIDECAR_BYTES, read_sidecar
from pipelines.errors import DataError


@pytest.mark.parametrize("names", [None, [], ["cat", "\ud800"]])
def test_good_sidecars(tmp_path, names):
    (tmp_path / "x.json").write_text(json.dumps({"num_images": 3, "class_names": names}))
    assert read_sidecar(tmp_path / "x.json")["class_names"] == names


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b'"num_images"',
        b"{}",
        b'{"num_images": "3"}',
        b'{"num_images": true}',
        b'{"num_images": ' + b"9" * 5000 + b"}",
        b'{"num_images": 3, "class_names": 7}',
        b'{"num_images": 3, "class_names": {"0": "cat"}}',
        b'{"num_images": 3, "class_names": ["cat", 7]}',
        b'{"num_images": 3, "class_names": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"num_images": 3, "class_names": [' + b'"",' * 1_000_000 + b'""]}',
        b'{"num_images": 3}' + b" " * MAX_SIDECAR_BYTES,
    ],
    ids=lambda content: content[:40].decode(errors="replace"),
)
def test_bad_sidecars(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: not a sidecar of `fastssl convert`"):
        read_sidecar(tmp_path / "x.json")


def test_names_of_classes_that_no_sidecar_could_hold(tmp_path):
    with pytest.raises(DataError, match="too long for a sidecar"):
        BetonWriter(tmp_path / "x.beton", class_names=["x" * 9_000_000])
