"""Neighbours are those of a search by brute force, whatever the pieces; similarities can be read."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.covariance import oas

import fastssl
from fastssl.embedding import table as tables
from fastssl.embedding.grid import draw_grid
from fastssl.embedding.neighbours import find_query, nearest, shrunk
from fastssl.embedding.table import Piece, open_table, read_table
from fastssl.errors import UserError
from pipelines.errors import DataError

NUM_ROWS, NUM_FEATURES = 200, 16
BROKEN = (5, 60)


def write(path, features, paths=None, about=None):
    paths = paths or [f"/photos/{i}.jpg" for i in range(len(features))]
    errors = [None if np.isfinite(row).all() else "broken" for row in features]
    with open_table(path, num_rows=len(features), num_features=features.shape[1], about=about or {}) as table:
        table.write(Piece(paths, [i % 2 for i in range(len(features))], errors, features))
    return path


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """A large mean, as encoders have it, and directions of very different variance."""
    rng = np.random.default_rng(0)
    values = 30 + rng.standard_normal((NUM_ROWS, NUM_FEATURES)) * np.geomspace(3, 0.03, NUM_FEATURES)
    values[list(BROKEN)] = np.nan
    return values.astype(np.float32)


@pytest.fixture(params=[13, 8192], ids=["many pieces", "one piece"])
def table(request, features, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_MAX_ROWS", request.param)
    return write(tmp_path / "x.parquet", features)


def in_space(features: np.ndarray, similarity: str) -> np.ndarray:
    """By scikit-learn, in float64: unit vectors whose products are the similarities."""
    x = features.astype(np.float64)
    x = x if similarity == "cosine" else x - np.nanmean(x, 0)
    if similarity == "whitened":
        covariance, _ = oas(x[~np.isnan(x[:, 0])], assume_centered=True)
        x = x @ np.linalg.cholesky(np.linalg.inv(covariance))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("similarity", ["centred", "whitened", "cosine"])
@pytest.mark.parametrize("row", [0, 77, NUM_ROWS - 1])
def test_they_are_those_of_brute_force(table, features, similarity, row) -> None:
    unit = in_space(features, similarity)
    expected = np.nan_to_num(unit @ unit[row], nan=-2)
    expected[row] = -2
    order = np.argsort(-expected, kind="stable")[:10]
    found = fastssl.neighbours(table, f"/photos/{row}.jpg", similarity=similarity)
    assert [each.rank for each in found] == list(range(1, 11))
    # float32: of cosines near 1 the order is not that of float64
    np.testing.assert_allclose([each.similarity for each in found], expected[order], atol=3e-6)
    np.testing.assert_allclose(expected[[each.row for each in found]], expected[order], atol=3e-6)
    assert all(each.path == f"/photos/{each.row}.jpg" and each.label == each.row % 2 for each in found)


def test_centred_similarities_can_be_read_and_raw_cosines_cannot(table) -> None:
    spread = {}
    for similarity in ("centred", "whitened", "cosine"):
        values = [
            each.similarity for each in fastssl.neighbours(table, "/photos/0.jpg", k=NUM_ROWS, similarity=similarity)
        ]
        spread[similarity] = max(values) - min(values)
        assert len(values) == NUM_ROWS - len(BROKEN) - 1
    assert spread["cosine"] < 0.05
    assert min(spread["centred"], spread["whitened"]) > 1


def test_features_are_a_query_too(table, features) -> None:
    by_row = fastssl.neighbours(table, "/photos/3.jpg", k=4)
    for given in (features[3], torch.from_numpy(features[3]), features[3].tolist()):
        found = fastssl.neighbours(table, given, k=5)
        assert (found[0].row, found[0].similarity) == (3, pytest.approx(1, abs=1e-6))
        assert [each.row for each in found[1:]] == [each.row for each in by_row]


def test_equal_similarities_come_in_the_order_of_the_rows(tmp_path) -> None:
    rows = np.array([[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]], np.float32)
    found = fastssl.neighbours(write(tmp_path / "x.parquet", rows), "/photos/1.jpg", similarity="cosine")
    assert [each.row for each in found] == [2, 4, 0, 3]


def test_images_that_are_all_equal_have_no_direction(tmp_path) -> None:
    table = write(tmp_path / "x.parquet", np.ones((4, 3), np.float32))
    for similarity in ("centred", "whitened"):
        assert [each.similarity for each in fastssl.neighbours(table, "/photos/0.jpg", similarity=similarity)] == [
            0
        ] * 3


@pytest.mark.parametrize("num", [2, 5, 40, 1000])
def test_the_shrinkage_is_that_of_scikit_learn(num) -> None:
    x = np.random.default_rng(num).standard_normal((num, 12)) * np.arange(1, 13)
    x -= x.mean(0)
    expected, _ = oas(x, assume_centered=True)
    np.testing.assert_allclose(shrunk(x.T @ x / num, num), expected, rtol=1e-10, atol=1e-12)


def test_bad_questions_are_named(table, tmp_path, features) -> None:
    opened = read_table(table)
    for settings, message in (
        ({"k": 0}, "-k must be >= 1"),
        ({"k": 1, "similarity": "nearest"}, "must be one of centred, whitened, cosine"),
    ):
        with pytest.raises(UserError, match=message):
            nearest(opened, features[0], **settings)
    with pytest.raises(UserError, match=r"needs 16 finite features, got \[3\]"):
        nearest(opened, features[0, :3], k=1)
    with pytest.raises(UserError, match="needs 16 finite features"):
        nearest(opened, features[BROKEN[0]], k=1)
    with pytest.raises(DataError, match=r"5.jpg has no features in .*: broken"):
        fastssl.neighbours(table, "/photos/5.jpg")
    with pytest.raises(DataError, match="neither a file nor a path in"):
        fastssl.neighbours(table, "/photos/none.jpg")
    with pytest.raises(DataError, match="no other image with features"):
        fastssl.neighbours(write(tmp_path / "one.parquet", features[:1]), "/photos/0.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "new.png")
    with pytest.raises(DataError, match="does not name its model"):
        fastssl.neighbours(table, tmp_path / "new.png")


def test_the_grid_shows_the_images_and_names_those_that_are_gone(tmp_path, features) -> None:
    paths = [str(tmp_path / f"bild_ü{i}.png") for i in range(4)]
    for i, path in enumerate(paths[:3]):
        Image.new("RGB", (30 + i, 20), (80 * i, 0, 255)).save(path)
    table = read_table(write(tmp_path / "x.parquet", features[:4], paths))
    query = find_query(table, paths[0])
    found = nearest(table, query.features, k=10, without=query.row)
    draw_grid(table, query, found, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as grid:
        colours = {colour for _, colour in grid.convert("RGB").getcolors(1 << 20)}
    assert {(0, 0, 255), (80, 0, 255), (160, 0, 255), (211, 211, 211)} < colours
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: .* cannot be written"):
        draw_grid(table, query, found, tmp_path / "file" / "grid.png")
