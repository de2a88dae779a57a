"""The feature cache: read again, told apart by every part of the key, never a part of a file."""

import json

import numpy as np
import pytest

from fastssl.errors import ConfigError
from fastssl.evaluation.feature_cache import cached_features, data_identity
from pipelines.beton import BetonReader, BetonWriter
from pipelines.beton.format import sidecar_path

KEY = {"step": 3, "data": {"file_bytes": 10, "checksum": "a"}, "dtype": "float32"}
ROWS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


class _Encode:
    def __init__(self, rows: np.ndarray = ROWS) -> None:
        self.num_calls = 0
        self.rows = rows

    def __call__(self):
        self.num_calls += 1
        yield self.rows[:4]
        yield self.rows[4:]


def test_features_are_computed_once_and_read_from_a_map(tmp_path):
    encode = _Encode()
    first = cached_features(tmp_path / "new", "train", KEY, 7, encode)
    second = cached_features(tmp_path / "new", "train", KEY, 7, encode)
    assert encode.num_calls == 1
    assert isinstance(second, np.memmap)
    assert np.array_equal(first, ROWS)
    assert np.array_equal(second, ROWS)
    assert len(list((tmp_path / "new").iterdir())) == 1  # nothing half-written is left
    second[0, 0] = 99.0  # the map is private
    assert np.array_equal(cached_features(tmp_path / "new", "train", KEY, 7, encode), ROWS)


@pytest.mark.parametrize(
    "change", [{"step": 4}, {"data": {"file_bytes": 10, "checksum": "b"}}, {"dtype": "float16"}, {"view": 32}]
)
def test_another_key_is_computed_again(change, tmp_path):
    cached_features(tmp_path, "train", KEY, 7, _Encode())
    encode = _Encode(ROWS + 1)
    found = cached_features(tmp_path, "train", KEY | change, 7, encode)
    assert encode.num_calls == 1
    np.testing.assert_allclose(found, ROWS + 1, rtol=1e-3)  # float16 has 11 bits
    assert found.dtype == (KEY | change)["dtype"]


@pytest.mark.parametrize("num_bytes", [0, 5, 60, -1, -50])
def test_a_truncated_file_is_found_and_made_again(num_bytes, tmp_path, capsys):
    cached_features(tmp_path, "train", KEY, 7, _Encode())
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:num_bytes])
    encode = _Encode()
    assert np.array_equal(cached_features(tmp_path, "train", KEY, 7, encode), ROWS)
    assert encode.num_calls == 1
    assert "damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_what_ends_in_an_error_leaves_nothing_behind(tmp_path):
    def fails():
        yield ROWS[:4]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        cached_features(tmp_path, "train", KEY, 7, fails)
    with pytest.raises(ValueError, match="returned 7 feature vectors for 8 images"):
        cached_features(tmp_path, "train", KEY, 8, _Encode())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/features cannot be written"):
        cached_features(tmp_path / "file" / "features", "train", KEY, 7, _Encode())


def test_files_are_told_apart_with_and_without_a_sidecar(digits, tmp_path):
    train, test = BetonReader(digits / "train.beton"), BetonReader(digits / "test.beton")
    assert data_identity(train) != data_identity(test)
    assert data_identity(train)["checksum"] == train.sidecar["rows_sha256"]
    bare = tmp_path / "bare.beton"
    content = (digits / "test.beton").read_bytes()
    bare.write_bytes(content)
    assert not sidecar_path(bare).exists()
    before = data_identity(BetonReader(bare))
    assert before == data_identity(BetonReader(bare))
    bare.write_bytes(content[:-1] + bytes([content[-1]]))  # another file of the same size
    assert data_identity(BetonReader(bare)) != before


def test_a_file_with_the_sidecar_of_another_is_told_apart(tmp_path):
    found = []
    for level in (1, 2):
        path = tmp_path / "x.beton"
        with BetonWriter(path, overwrite=True) as writer:
            writer.write_raw(np.full((8, 8, 3), level, np.uint8))
        sidecar_path(path).write_text(json.dumps({"num_images": 1, "rows_sha256": "of another file"}))
        found.append(data_identity(BetonReader(path)))
    assert found[0]["checksum"] == found[1]["checksum"]
    assert found[0] != found[1]
