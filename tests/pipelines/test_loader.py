"""The training and eval loaders: same batches whatever the ranks, the engine and the restarts."""

import io
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.beton import BetonReader, BetonWriter
from pipelines.errors import DataError
from pipelines.loader import DataConfig, build_eval_loader, build_loader, open_train_images, remote_line
from pipelines.sampler import quasi_random_windows
from pipelines.shards.sharded_images import ShardedImages
from pipelines.views import RECIPES, ViewsConfig, ViewSpec
from tests.helpers.fault_server import FaultServer
from tests.helpers.shards import write_pictures

CPU = torch.device("cpu")
VIEWS = ViewsConfig(recipe="mio_small", size_px=24)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> BetonReader:
    """26 images, raw and JPEG by turns, labelled id % 3."""
    path = tmp_path_factory.mktemp("loader") / "mixed.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, 26) as writer:
        for i in range(26):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            image = coarse.resize((40 + i, 50), Image.Resampling.BICUBIC)
            if i % 2:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=95)
                writer.write_jpeg(file.getvalue(), height_px=50, width_px=40 + i, label=i % 3)
            else:
                writer.write_raw(np.asarray(image), label=i % 3)
    return BetonReader(path)


@pytest.fixture
def build(reader):
    """`build_loader` on the file above; closes what it built."""
    loaders = []

    def make(*, views=VIEWS, rank=0, world_size=1, seed=5, **data):
        cfg = DataConfig(**({"train": str(reader.path), "global_batch_size": 8} | data))
        places = {"rank": rank, "world_size": world_size, "device": CPU, "num_threads": 1}
        loaders.append(build_loader(reader, cfg, views, seed=seed, **places))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def assert_equal_batches(batches, expected) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        torch.testing.assert_close(batch.sample_ids, other.sample_ids)
        torch.testing.assert_close(batch.labels, other.labels)
        for view, other_view in zip(batch.views, other.views, strict=True):
            torch.testing.assert_close(view, other_view, rtol=0, atol=0)


def test_an_epoch(build, reader):
    loader = build()
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 3
    assert loader.num_samples == 26
    for batch in batches:
        assert [view.shape for view in batch.views] == [(8, 3, 24, 24)] * 2
        assert all(view.dtype == torch.float32 for view in batch.views)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
        np.testing.assert_array_equal(batch.labels.numpy(), reader.labels[batch.sample_ids.numpy()])
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert len(ids.unique()) == 24
    assert not torch.equal(ids, torch.cat([batch.sample_ids for batch in loader.epoch(1)]))
    assert_equal_batches(list(loader.epoch(0)), batches)


@pytest.mark.parametrize("engine", ["ffcv", "dali", "resident", "torch"])
def test_two_ranks_together_are_one(build, engine):
    whole = list(build(engine=engine).epoch(2))
    halves = [list(build(engine=engine, rank=rank, world_size=2).epoch(2)) for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close(batch.sample_ids, torch.cat([first.sample_ids, second.sample_ids]))
        for view in range(2):
            joined = torch.cat([first.views[view], second.views[view]])
            torch.testing.assert_close(batch.views[view], joined, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["ffcv", "dali", "resident", "torch", "synthetic"])
def test_an_epoch_goes_on_from_any_batch(build, engine):
    whole = list(build(engine=engine).epoch(1))
    for first_batch in range(4):
        assert_equal_batches(list(build(engine=engine).epoch(1, first_batch)), whole[first_batch:])


@pytest.mark.parametrize("engine", ["ffcv", "dali", "resident", "torch"])
@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_an_epoch_goes_on_with_other_ranks(large, monkeypatch, order, engine):
    """The first global batch on two ranks, the second on four, the third on one: those of one rank alone."""
    monkeypatch.setattr("pipelines.sampler.CHUNK_BYTES", 200_000)
    cfg = DataConfig(global_batch_size=8, order=order, window_mb=1, engine=engine)

    def build(rank: int = 0, world_size: int = 1):
        places = {"rank": rank, "world_size": world_size, "device": CPU, "num_threads": 1}
        return build_loader(large, cfg, VIEWS, seed=5, **places)

    whole = list(build().epoch(3))
    for number, world_size in enumerate((2, 4, 1)):
        loaders = [build(rank, world_size) for rank in range(world_size)]
        parts = [next(iter(loader.epoch(3, first_batch=number))) for loader in loaders]
        torch.testing.assert_close(torch.cat([part.sample_ids for part in parts]), whole[number].sample_ids)
        for view, expected in enumerate(whole[number].views):
            torch.testing.assert_close(torch.cat([part.views[view] for part in parts]), expected, rtol=0, atol=0)
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> BetonReader:
    """40 raw images of 120 kB."""
    path = tmp_path_factory.mktemp("loader") / "large.beton"
    with BetonWriter(path, 40) as writer:
        for i in range(40):
            writer.write_raw(np.full((200, 200, 3), 6 * i, np.uint8))
    return BetonReader(path)


@pytest.mark.parametrize("engine", ["ffcv", "dali", "torch"])
@pytest.mark.parametrize("cache", ["os", "ram", "none"])
def test_a_quasi_random_epoch_goes_window_by_window(large, monkeypatch, cache, engine):
    monkeypatch.setattr("pipelines.sampler.CHUNK_BYTES", 200_000)
    cfg = DataConfig(global_batch_size=4, order="quasi_random", window_mb=1, cache=cache, engine=engine)
    views = ViewsConfig(recipe="weak", size_px=24)
    loader = build_loader(large, cfg, views, seed=5, rank=0, world_size=1, device=CPU, num_threads=1)
    batches = list(loader.epoch(1))
    loader.close()
    ids = torch.cat([batch.sample_ids for batch in batches]).numpy()
    np.testing.assert_array_equal(np.sort(ids), np.arange(40))
    windows = quasi_random_windows(large.data_ptr, large.data_bytes, 5, 1, 1_000_000)
    assert np.all(np.diff(windows[ids]) >= 0)
    assert windows.max() == 4
    assert np.any(np.diff(np.flatnonzero(windows == 0)) > 3)  # from all over the file
    mean, std = np.array(views.mean), np.array(views.std)
    grey = torch.cat([batch.views[0][:, :, 12, 12] for batch in batches]).numpy() * std + mean
    np.testing.assert_allclose(grey, np.repeat(6 * ids[:, None] / 255, 3, axis=1), atol=1e-6)


def test_an_epoch_left_and_resumed_is_the_same(build):
    loader = build()
    whole = list(loader.epoch(1))
    start = []
    for batch in loader.epoch(1):
        start.append(batch)
        if len(start) == 2:
            break
    assert_equal_batches(start + list(loader.epoch(1, first_batch=2)), whole)


def test_ffcv_equals_torch(build):
    """One level of the resampler (1/255, over the smallest std) times what colour jitter can make of it."""
    for batch, reference in zip(build().epoch(0), build(engine="torch").epoch(0), strict=True):
        torch.testing.assert_close(batch.sample_ids, reference.sample_ids)
        for view, expected in zip(batch.views, reference.views, strict=True):
            difference = (view - expected).abs()
            assert difference.max() < 10 / 255 / 0.224
            assert difference.mean() < 1e-3


def test_views_come_in_the_order_of_the_specs(build, monkeypatch):
    sizes = (16, 8, 16, 12)
    monkeypatch.setitem(RECIPES, "four_sizes", tuple(ViewSpec(size_px=size) for size in sizes))
    views = ViewsConfig(recipe="four_sizes")
    for batch in build(views=views).epoch(0):
        assert [view.shape[-1] for view in batch.views] == list(sizes)


def test_leaving_an_epoch_stops_its_thread(build):
    loader = build()
    list(loader.epoch(0))
    before = threading.active_count()
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    assert threading.active_count() <= before


def test_what_the_config_cannot_mean(build, reader):
    with pytest.raises(DataError, match=r"data\.global_batch_size is 64, but .*mixed\.beton holds 26 images"):
        build(global_batch_size=64)
    with pytest.raises(DataError, match=r"data\.global_batch_size is 8, not a multiple of the 3 processes"):
        build(world_size=3)
    with pytest.raises(ValueError, match="rank"):
        build(world_size=2, rank=2)
    with pytest.raises(ValueError, match=r"first_batch must be in \[0, 3\]"):
        build().epoch(0, first_batch=4)
    with pytest.raises(DataError, match=r"data\.train is not set"):
        open_train_images(DataConfig())
    assert open_train_images(DataConfig(train=str(reader.path))).num_samples == 26


@pytest.mark.parametrize(
    ("field", "value"),
    [("global_batch_size", 0), ("num_workers", -1), ("prefetch_batches", 0), ("holdout_fraction", 1.0)],
)
def test_data_config_names_a_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        DataConfig(**{field: value})


@pytest.mark.parametrize("engine", ["ffcv", "dali", "resident", "torch"])
def test_eval_batches(reader, engine):
    views = ViewsConfig(recipe="mio_small", size_px=36, eval_crop_fraction=0.72)
    loader = build_eval_loader(reader, views, local_batch_size=10, engine=engine, device=CPU, num_workers=1)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch.labels) for batch in batches] == [10, 10, 6]
    assert torch.equal(torch.cat([batch.sample_ids for batch in batches]), torch.arange(26))
    # Image 10 is 50 x 50: the centred square of .72 is 36 px wide, so its pixels are copied.
    pixels = torch.from_numpy(reader.decode(10)[7:43, 7:43].copy()).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(views.mean)[:, None, None]) / torch.tensor(views.std)[:, None, None]
    torch.testing.assert_close(batches[1].views[0][0], expected, rtol=0, atol=1e-4)
    assert_equal_batches(list(loader), batches)
    loader.close()


def test_eval_of_chosen_samples(reader):
    ids = np.array([4, 2, 9])
    loader = build_eval_loader(reader, VIEWS, local_batch_size=2, engine="ffcv", device=CPU, sample_ids=ids)
    assert torch.cat([batch.sample_ids for batch in loader]).tolist() == [4, 2, 9]
    loader.close()
    with pytest.raises(ValueError, match="sample_ids"):
        build_eval_loader(reader, VIEWS, local_batch_size=2, engine="ffcv", device=CPU, sample_ids=np.array([26]))
    with pytest.raises(ValueError, match="local_batch_size"):
        build_eval_loader(reader, VIEWS, local_batch_size=0, engine="ffcv", device=CPU)


def test_importing_the_loader_is_light():
    code = "import sys, pipelines.loader; print({'torch', 'ffcv', 'numba', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_remote_data_set_says_beforehand_what_it_fetches_and_counts_what_it_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.beton.writer.PAGE_BYTES", 4096)
    write_pictures(tmp_path / "set", num=2, num_each=32)
    with FaultServer(tmp_path / "set") as server:
        cfg = DataConfig(train=server.url, global_batch_size=8, num_workers=1)
        images = open_train_images(cfg)
        assert isinstance(images, ShardedImages)
        place = {"seed": 0, "rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": 1}
        loader = build_loader(images, cfg, ViewsConfig(recipe="byol", size_px=16), **place)
        num_bytes = images.manifest.image_bytes + 24 * 64
        first = loader.order.first_batch_bytes
        assert remote_line(images, cfg, loader, 1) == (
            f"{server.url}: 2 shards, 64 images, {num_bytes / 1e9:.3g} GB; an epoch fetches "
            f"{num_bytes / 1e9:.3g} GB per node; no cache (data.cache_dir), so each epoch fetches it again; "
            f"{first / 1e6:,.3g} MB come before the first batch"
        )
        kept = replace(cfg, cache_dir=str(tmp_path / "cache"), cache_gb=1)
        assert "; the cache of 1 GB (data.cache_gb) holds all of it; " in str(remote_line(images, kept, loader, 1))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert f"fetches {num_bytes // 2 / 1e9:.3g} GB per node" in str(remote_line(images, cfg, loader, 4))
        assert loader.remote_retries == {}
        server.plan("x-00000-of-00002.beton", "cut")
        assert len(list(loader.epoch(0))) == len(loader)
        assert loader.remote_retries == {"connection cut": 1}
        loader.close()
    local = replace(cfg, train=str(tmp_path / "set"))
    images = open_train_images(local)
    loader = build_loader(images, local, ViewsConfig(recipe="byol", size_px=16), **place)
    assert remote_line(images, local, loader, 1) is None
    assert loader.remote_retries is None
    loader.close()
