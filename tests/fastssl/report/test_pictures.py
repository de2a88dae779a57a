"""Neighbours, votes, maps and filters of features that are known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastssl.config import Config
from fastssl.report.pictures import (
    choose_album,
    covariance_eigenvalues,
    find_mistakes,
    first_filters,
    nearest_others,
    project,
)
from fastssl.report.thumbnails import draw_filters, draw_sheet, smaller
from pipelines.hold_out import hold_out_ids
from pipelines.loader import DataConfig
from pipelines.shards.open_images import some_labels
from tests.helpers.shards import write_pictures

# Two groups of four features in opposite directions.
FEATURES = np.array([[1, 0.1 * i] for i in range(4)] + [[-1, 0.1 * i] for i in range(4)], np.float32)


def test_neighbours_are_others_and_the_most_similar_come_first():
    positions, similarity = nearest_others(FEATURES, most=20)
    assert positions.shape == similarity.shape == (8, 7)
    for i, row in enumerate(positions):
        assert sorted([i, *row]) == list(range(8))
        assert set(row[:3]) == set(range(4)) - {i} if i < 4 else set(range(4, 8)) - {i}
    assert (np.diff(similarity) <= 0).all()


def test_an_image_of_another_class_than_its_neighbours_is_a_mistake():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, -1])
    found = find_mistakes(labels, *nearest_others(FEATURES, most=3))
    assert found is not None
    assert found.worst.tolist() == [3]
    assert found.predicted[3] == 0
    assert found.top1 == pytest.approx(6 / 7)
    assert find_mistakes(np.array([0] * 4 + [-1] * 4), *nearest_others(FEATURES, most=3)) is None


def test_eigenvalues_are_those_of_the_covariance():
    features = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    expected = np.linalg.eigvalsh(np.cov(features.T))[::-1]
    # rounding of float32 features
    np.testing.assert_allclose(covariance_eigenvalues(features), expected / expected.sum(), rtol=1e-5)
    assert len(covariance_eigenvalues(features[:3])) == 2


def test_a_map_of_few_or_equal_features_is_finite():
    for features in (FEATURES[:3], np.ones((5, 1), np.float32)):
        place, how = project(features)
        assert place.shape == (len(features), 2)
        assert np.isfinite(place).all()
        assert how == "PCA"


def test_filters_are_those_of_the_first_convolution_of_rgb_images():
    first = nn.Conv2d(3, 5, 3)
    found = first_filters(nn.Sequential(first, nn.ReLU(), nn.Conv2d(5, 7, 3)))
    assert found is not None
    assert torch.equal(torch.from_numpy(found), first.weight.detach())
    assert draw_filters(found).startswith("data:image/webp;base64,")
    assert first_filters(nn.Conv2d(1, 5, 3)) is None
    assert first_filters(nn.Linear(3, 2)) is None


def test_a_sheet_places_every_thumbnail_and_a_damaged_picture_is_none():
    sheet = draw_sheet([Image.new("RGB", (48, 30), colour) for colour in ("red", "green", "blue")])
    assert (sheet.num_columns, sheet.num_rows) == (2, 2)
    assert sheet.style(2) == "background-position:0.0000% 100.0000%"
    assert smaller(b"\x89PNG damaged") is None


def test_an_album_of_many_shards_is_spread_over_the_held_out_images_without_a_list_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    monkeypatch.setattr("pipelines.hold_out._PERIOD", 16)
    write_pictures(tmp_path / "set", num=5, num_each=8)  # two periods and a half
    for fraction in (0.25, 0.0):
        cfg = Config(data=DataConfig(train=str(tmp_path / "set"), holdout_fraction=fraction))
        album = choose_album(cfg, 1000)
        fit, held_out = hold_out_ids(album.reader, fraction)
        assert album.is_held_out == (fraction > 0)
        assert album.ids.tolist() == (held_out if fraction else fit).tolist()
        some = choose_album(cfg, 4).ids
        assert set(some) < set(album.ids)
        assert (some[0], some[-1]) == (album.ids[0], album.ids[-1])
    assert some_labels(album.reader, np.array([0, 9, 39])).tolist() == [0, 1, 1]
