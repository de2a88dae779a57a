"""Several data sets with weights: exact shares, the same batches for any number of ranks, own epochs."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.beton import BetonWriter
from pipelines.errors import DataError
from pipelines.loader import DataConfig, Loader, WeightedImages, build_loader, open_train_images
from pipelines.shards.build import write_manifest
from pipelines.shards.store import LocalStore
from pipelines.views import ViewsConfig

VIEWS = ViewsConfig(recipe="weak", size_px=8)
BATCH_SIZE = 32


def write(path: Path, num: int, level: int, class_names: list[str] | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    with BetonWriter(path, num, class_names=class_names) as writer:
        rng = np.random.default_rng(level)
        for i in range(num):
            pixels = rng.integers(level, level + 20, (8, 8, 3), np.uint8)
            writer.write_raw(pixels, label=i % 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A file of 100 dark images, and 6 shards of 100 bright ones."""
    folder = tmp_path_factory.mktemp("mixed")
    write(folder / "dark.beton", 100, 10)
    for k in range(6):
        write(folder / "bright" / f"x-{k:05d}-of-00006.beton", 100, 200 + k)
    write_manifest(LocalStore(folder / "bright"))
    return {"dark": str(folder / "dark.beton"), "bright": str(folder / "bright")}


def load(places: dict[str, str], *, rank: int = 0, world_size: int = 1, seed: int = 3, **weights: float) -> Loader:
    train = tuple(WeightedImages(path=places[name], weight=weight) for name, weight in weights.items())
    cfg = DataConfig(train=train, global_batch_size=BATCH_SIZE, lanes=8, num_workers=1, max_bad_fraction=0.0)
    ranks = {"seed": seed, "rank": rank, "world_size": world_size}
    return build_loader(open_train_images(cfg), cfg, VIEWS, **ranks, device=torch.device("cpu"), num_threads=1)


def ids_of(loader: Loader, epoch: int = 0, first_batch: int = 0) -> np.ndarray:
    return np.stack([batch.sample_ids.numpy().copy() for batch in loader.epoch(epoch, first_batch)])


def test_each_batch_has_the_shares_of_the_weights(places):
    ids = ids_of(load(places, dark=1, bright=3))
    assert ids.shape == (700 // BATCH_SIZE, BATCH_SIZE)
    assert ((ids < 100).sum(1) == BATCH_SIZE // 4).all()


def test_shares_that_do_not_divide_a_batch_are_exact_over_the_run(places):
    loader = load(places, dark=1, bright=6)
    ids = np.concatenate([ids_of(loader, epoch).reshape(-1) for epoch in range(3)])
    assert abs((ids < 100).sum() - len(ids) / 7) <= 8  # a sample of each lane
    in_batches = (ids.reshape(-1, BATCH_SIZE) < 100).sum(1)
    assert in_batches.min() >= 2
    assert in_batches.max() <= 8


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_batches_are_the_same_for_any_number_of_ranks_and_from_any_step(places, world_size):
    whole = ids_of(load(places, dark=1, bright=2), epoch=2)
    parts = [ids_of(load(places, rank=r, world_size=world_size, dark=1, bright=2), 2, 7) for r in range(world_size)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[7:])


def test_a_source_comes_once_in_its_own_epoch_and_then_again_with_other_views(places):
    loader = load(places, dark=1, bright=1)  # 350 of 700 samples are dark: three and a half epochs of 100 images
    ids, views = [], []
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            ids.append(batch.sample_ids.numpy().copy())
            views.append(batch.views[0].clone())
    ids, views = np.concatenate(ids), torch.cat(views)
    dark = np.flatnonzero(ids < 100)
    per_epoch = 100 // 8 * 8
    counts = np.bincount(ids[dark][: per_epoch * 3], minlength=100)
    assert counts.max() <= 4  # three epochs; the lanes do not begin an epoch in the same batch
    assert counts.min() >= 2
    again = [dark[ids[dark] == i] for i in np.unique(ids[dark])[:10]]
    assert all(not torch.equal(views[places[0]], views[places[1]]) for places in again)


def test_the_views_of_a_sample_are_those_of_its_source_alone_but_for_its_id(places):
    loader = load(places, dark=1, bright=1)
    levels = {True: [], False: []}
    for batch in islice(loader.epoch(0), 5):
        for is_dark, view in zip((batch.sample_ids < 100).tolist(), batch.views[0], strict=True):
            levels[is_dark].append(float(view.float().mean()))
    assert max(levels[True]) < min(levels[False])


def test_labels_count_only_where_all_sources_have_the_same_classes(places, tmp_path):
    batch = next(iter(load(places, dark=1, bright=1).epoch(0)))
    assert (batch.labels == -1).all()
    write(tmp_path / "a.beton", 64, 1, ["cat", "dog"])
    write(tmp_path / "b.beton", 64, 2, ["cat", "dog"])
    named = {"a": str(tmp_path / "a.beton"), "b": str(tmp_path / "b.beton")}
    batch = next(iter(load(named, a=1, b=1).epoch(0)))
    assert batch.labels.tolist() == (batch.sample_ids % 2).tolist()


def test_the_identity_holds_sources_and_weights(places):
    def identity(**weights: float) -> list[int]:
        return load(places, **weights).identity

    assert identity(dark=1, bright=2) == identity(dark=2, bright=4)
    assert len({tuple(identity(**w)) for w in ({"dark": 1, "bright": 2}, {"dark": 1, "bright": 3})}) == 2
    assert identity(dark=1, bright=2) != identity(bright=2, dark=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 5}, "data.lanes is 5, which does not divide data.global_batch_size 32"),
        ({"lanes": 32, "global_batch_size": 128}, None),
        ({"order": "random"}, "data.order=random: several data sets are mixed in lanes"),
        ({"cache": "ram"}, "data.cache=ram is for one file"),
    ],
)
def test_what_does_not_fit_is_one_line(places, changes, message):
    train = tuple(WeightedImages(path=place) for place in places.values())
    cfg = DataConfig(**{"train": train, "global_batch_size": BATCH_SIZE, **changes})
    places_of = {"seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": 1}
    if message is None:
        assert len(build_loader(open_train_images(cfg), cfg, VIEWS, **places_of)) == 5
        return
    with pytest.raises(DataError, match=message):
        build_loader(open_train_images(cfg), cfg, VIEWS, **places_of)


def test_more_ranks_than_lanes_are_refused(places):
    with pytest.raises(DataError, match=r"data\.lanes is 8, not a multiple of the 16 processes"):
        load(places, world_size=16, dark=1, bright=1)


def test_a_source_that_is_too_small_is_named(places, tmp_path):
    write(tmp_path / "few.beton", 7, 1)
    with pytest.raises(DataError, match=r"few\.beton: 7 images are too few for 8 lanes"):
        load(places | {"few": str(tmp_path / "few.beton")}, bright=1, few=1)


def test_a_damaged_image_is_replaced_within_the_mixture(places, tmp_path):
    write(tmp_path / "a.beton", 64, 1)
    with BetonWriter(tmp_path / "b.beton", 64) as writer:
        for _ in range(64):
            writer.write_jpeg(b"\xff\xd8 not a JPEG", height_px=8, width_px=8)
    train = tuple(WeightedImages(path=str(tmp_path / f"{name}.beton")) for name in "ab")
    cfg = DataConfig(train=train, global_batch_size=BATCH_SIZE, lanes=8, num_workers=1, max_bad_fraction=0.6)
    ranks = {"seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": 1}
    loader = build_loader(open_train_images(cfg), cfg, VIEWS, **ranks)
    ids = ids_of(loader)
    assert (ids < 64).all()
    assert loader.bad_sample_ids
