"""Batches of data sets of many shards: the same wherever the shards lie, whatever the ranks and the restarts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.beton import BetonReader
from pipelines.errors import DataChangedError, DataError
from pipelines.loader import DataConfig, Loader, WeightedImages, build_loader, open_train_images, remote_line
from pipelines.remote import BlockCache, RemoteStore
from pipelines.remote import cache as cache_module
from pipelines.samples import Samples
from pipelines.shards.lane_reader import LanesOrder, LaneStream
from pipelines.shards.manifest import MANIFEST_NAME, Manifest
from pipelines.shards.open_images import AnyImages, open_images
from pipelines.shards.pieces import RemoteFiles
from pipelines.shards.rows import HEAD_BYTES, MAX_IMAGE_BYTES, ROW, row_crc32
from pipelines.shards.sharded_images import ShardedImages, open_sharded
from pipelines.views import ViewsConfig
from tests.helpers.fault_server import FaultServer
from tests.helpers.nginx import nginx
from tests.helpers.processes import ROOT
from tests.helpers.s3 import s3_server, send, use
from tests.helpers.shards import IMAGES_OF_SHARDS, contents, write_image_shards

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
VIEWS = ViewsConfig(recipe="mio_small", size_px=16)
NUM, SIZE, LANES = sum(IMAGES_OF_SHARDS), 16, 4
NUM_BATCHES = 32  # 128 blocks of 4 images, and 3 images more
FIRST, SECOND, THIRD = (f"x-{k:05d}-of-00003.beton" for k in range(3))
SETTINGS: dict[str, Any] = {"global_batch_size": SIZE, "lanes": LANES, "window_mb": 1, "num_workers": 1}
QUICK: dict[str, Any] = {"silence_s": 1.0, "connect_s": 1.0, "first_wait_s": 0.01}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One .beton with the images of `folder`."""
    return tmp_path_factory.mktemp("whole") / "whole.beton"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, whole) -> Path:
    """Three shards and their manifest; not to be changed."""
    return write_image_shards(tmp_path_factory.mktemp("set") / "set", whole)


@pytest.fixture
def build() -> Iterator[Callable[..., Loader]]:
    """Builds loaders and closes them."""
    loaders: list[Loader] = []

    def make(images: AnyImages | Path | str, *, rank: int = 0, world_size: int = 1, seed: int = 5, **data) -> Loader:
        cfg = DataConfig(**SETTINGS | ({"train": ""} if isinstance(images, Opened) else {"train": str(images)}) | data)
        opened = images if isinstance(images, Opened) else open_train_images(cfg)
        places = {"rank": rank, "world_size": world_size, "device": CPU, "num_threads": 1}
        loaders.append(build_loader(opened, cfg, VIEWS, seed=seed, **places))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


Opened = BetonReader | ShardedImages


def batches_of(loader: Loader, epoch: int = 0, first_batch: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Ids, labels and views of each batch."""
    with closing(loader.epoch(epoch, first_batch)) as batches:
        return [(batch.sample_ids, batch.labels, *(view.clone() for view in batch.views)) for batch in batches]


def ids_of(loader: Loader, epoch: int = 0, first_batch: int = 0) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches_of(loader, epoch, first_batch)]


def assert_same(found: list[tuple[torch.Tensor, ...]], expected: list[tuple[torch.Tensor, ...]]) -> None:
    assert len(found) == len(expected) > 0
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def side_by_side(parts: list[list[tuple[torch.Tensor, ...]]]) -> list[tuple[torch.Tensor, ...]]:
    """Global batches from the ranks' own."""
    return [tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True)) for batches in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def expected(folder) -> list[tuple[torch.Tensor, ...]]:
    """The batches of epoch 0 from the local folder."""
    cfg = DataConfig(train=str(folder), **SETTINGS)
    places: dict[str, Any] = {"rank": 0, "world_size": 1, "device": CPU, "num_threads": 1}
    with closing(build_loader(open_train_images(cfg), cfg, VIEWS, seed=5, **places)) as loader:
        return batches_of(loader)


# ------------------------------------------------------------------ one data set, however it is named


def test_what_a_data_set_holds_is_what_its_files_hold(folder, whole):
    images, file = open_images(folder), BetonReader(whole)
    assert images.num_samples == file.num_samples == NUM
    np.testing.assert_array_equal(images.labels, file.labels)
    np.testing.assert_array_equal(images.sizes, file.sizes)
    assert images.stored_modes == file.stored_modes == (0, 1)
    ids = np.random.default_rng(1).permutation(NUM)
    found, of_file = images.samples(ids), file.samples(ids)
    for position in range(NUM):
        np.testing.assert_array_equal(found.image_bytes(position), of_file.image_bytes(position))
    first = 0
    for path, num in zip(sorted(folder.glob("*.beton")), IMAGES_OF_SHARDS, strict=True):
        shard = BetonReader(path)
        own = shard.samples(np.arange(num))
        its = images.samples(np.arange(first, first + num))
        assert all(np.array_equal(own.image_bytes(i), its.image_bytes(i)) for i in range(num))
        first += num


def test_a_folder_a_manifest_a_pattern_and_a_url_are_the_same(build, folder, expected):
    places = (folder / MANIFEST_NAME, folder / "x-*.beton", f"file://{folder}", f"file://{folder}/{MANIFEST_NAME}")
    identity = open_images(folder).identity
    for place in map(str, places):
        assert open_images(place).identity == identity
        assert_same(batches_of(build(place)), expected)
    with FaultServer(folder) as server:
        for place in (server.url, f"{server.url}/", f"{server.url}/{MANIFEST_NAME}"):
            assert_same(batches_of(build(place)), expected)


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("engine", ["ffcv", "torch", "resident", "dali"])
def test_engines_give_the_views_that_they_give_of_one_file(build, folder, whole, engine, is_remote):
    of_file = build(whole, engine=engine, order="random", lanes=0)
    by_id = {}
    for ids, labels, *views in batches_of(of_file, 2):
        by_id |= {int(i): (labels[k], *(view[k] for view in views)) for k, i in enumerate(ids)}
    assert len(by_id) == NUM - NUM % SIZE
    num_compared = 0
    for ids, labels, *views in batches_of(build(f"file://{folder}" if is_remote else folder, engine=engine), 2):
        for k, i in enumerate(ids.tolist()):
            found = (labels[k], *(view[k] for view in views))
            if i in by_id:
                assert all(torch.equal(a, b) for a, b in zip(found, by_id[i], strict=True))
                num_compared += 1
    assert num_compared > 500


def test_the_synthetic_engine_takes_the_same_ids(build, folder, expected):
    found = batches_of(build(folder, engine="synthetic"))
    assert [batch[0].tolist() for batch in found] == [batch[0].tolist() for batch in expected]
    assert [[part.shape for part in batch] for batch in found] == [[part.shape for part in batch] for batch in expected]


# ------------------------------------------------------------------ lanes and ranks


def test_lanes_are_the_same_for_one_two_and_four_ranks(build, folder, expected):
    for world_size in (2, 4):
        parts = [batches_of(build(folder, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert_same(side_by_side(parts), expected)
        met = [{i for batch in part for i in batch[0].tolist()} for part in parts]
        assert sum(map(len, met)) == len(set.union(*met)) == NUM_BATCHES * SIZE
        blocks = [{i // 4 for i in ids} for ids in met]
        assert sum(map(len, blocks)) == len(set.union(*blocks))


def test_no_range_is_fetched_by_two_ranks(build, folder):
    fetched = []
    for rank in range(2):
        with FaultServer(folder) as server:
            batches_of(build(server.url, rank=rank, world_size=2))
            ranges = [(request.path, request.range) for request in server.requests if request.range]
        assert len(ranges) == len(set(ranges))
        fetched.append(set(ranges))
    assert len(fetched[0]) > 64
    assert not fetched[0] & fetched[1]


@pytest.mark.parametrize("order", ["lanes", "random"])
def test_an_epoch_goes_on_at_any_batch_with_any_number_of_ranks(build, folder, order):
    alone = batches_of(build(folder, order=order), 1)
    assert len(alone) == NUM_BATCHES
    for first_batch in range(NUM_BATCHES + 1):
        world_size = (1, 2, 4)[first_batch % 3]
        loaders = [build(folder, order=order, rank=rank, world_size=world_size) for rank in range(world_size)]
        parts = [batches_of(loader, 1, first_batch) for loader in loaders]
        if first_batch < NUM_BATCHES:
            assert_same(side_by_side(parts), alone[first_batch:])
        else:
            assert parts == [[]] * world_size


def test_an_epoch_leaves_out_little_and_others_each_time(build, folder):
    """512 of 515: which ones of the last block's seven images are left out changes."""
    loader = build(folder)
    left_out = []
    for epoch in range(4):
        ids = [i for batch in ids_of(loader, epoch) for i in batch]
        assert len(ids) == len(set(ids))
        left_out.append(set(range(NUM)) - set(ids))
        assert len(left_out[-1]) < 4 * LANES + SIZE
    assert len(set(map(frozenset, left_out))) > 1
    assert ids_of(loader, 0) != ids_of(loader, 1)
    assert ids_of(build(folder, seed=6), 0) != ids_of(loader, 0)


def test_random_order_is_a_permutation_for_any_number_of_ranks(build, folder):
    alone = batches_of(build(folder, order="random"))
    ids = [i for batch in alone for i in batch[0].tolist()]
    assert len(ids) == len(set(ids)) == NUM - NUM % SIZE
    assert ids != [i for batch in ids_of(build(folder, order="random"), 1) for i in batch]
    for world_size in (2, 4):
        parts = [
            batches_of(build(folder, order="random", rank=rank, world_size=world_size)) for rank in range(world_size)
        ]
        assert_same(side_by_side(parts), alone)


def test_random_order_of_remote_data_needs_a_cache_that_holds_all(build, folder, tmp_path):
    with FaultServer(folder) as server:
        for more in ({}, {"cache_dir": str(tmp_path), "cache_gb": 0.0021}):
            with pytest.raises(
                DataError, match=r"^data\.order=random: .* is remote and 0\.002\d+ GB large: take lanes, or"
            ):
                build(server.url, order="random", **more)
        local = batches_of(build(folder, order="random"))
        assert_same(batches_of(build(server.url, order="random", cache_dir=str(tmp_path), cache_gb=0.1)), local)
        num = len(server.requests)
        assert_same(batches_of(build(server.url, order="random", cache_dir=str(tmp_path), cache_gb=0.1)), local)
        assert len(server.requests) == num + 1  # the manifest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lanes": 3}, r"data\.lanes is 3, which does not divide data\.global_batch_size 16: change one of them"),
        ({"world_size": 2, "lanes": 1}, r"data\.lanes is 1, not a multiple of the 2 processes: change one of them"),
        ({"order": "quasi_random"}, r"data\.order=quasi_random: .* is a data set of many files: take lanes"),
        ({"cache": "ram"}, r"data\.cache=ram is for one file"),
        ({"global_batch_size": 1024, "lanes": 1024}, r"data\.global_batch_size is 1024, but .* holds 515 images"),
    ],
)
def test_what_cannot_be_meant(build, folder, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        build(folder, **settings)
    assert "\n" not in str(caught.value)


def test_as_many_lanes_as_images(build, folder):
    (ids,) = ids_of(build(folder, global_batch_size=NUM, lanes=NUM))
    assert sorted(ids) == list(range(NUM))


def test_lanes_of_one_file(build, whole):
    with pytest.raises(DataError, match=r"data\.order=lanes: .*whole\.beton is one file: take random or quasi_random"):
        build(whole, order="lanes")


# ------------------------------------------------------------------ remote


def test_nginx_gives_the_batches_of_the_folder(build, folder, expected, tmp_path):
    with nginx(folder, tmp_path / "nginx") as url:
        assert_same(batches_of(build(url)), expected)


def test_s3_gives_the_batches_of_the_folder(build, folder, expected, monkeypatch):
    with s3_server() as endpoint:
        use(monkeypatch, endpoint)
        for name, content in contents(folder).items():
            send(f"{endpoint}/bucket/deep/set/{name}", "PUT", content)
        assert_same(batches_of(build("s3://bucket/deep/set")), expected)


def test_a_second_epoch_is_read_from_the_cache(build, folder, expected, tmp_path):
    with FaultServer(folder) as server:
        loader = build(server.url, cache_dir=str(tmp_path), cache_gb=0.1)
        first = [batches_of(loader, epoch) for epoch in (0, 1)]
        num = len(server.requests)
        assert_same(first[0], expected)
        assert_same(batches_of(loader, 0), expected)
        assert_same(batches_of(loader, 1), first[1])
        assert len(server.requests) == num
        # All blocks of the data set by now, but those that both epochs left out.
        batches_of(loader, 2)
        assert len(server.requests) - num <= 2 * (LANES + 1)


READ_AN_EPOCH = """
import hashlib, json, sys
import torch
from pipelines.loader import DataConfig, build_loader, open_train_images
from pipelines.views import ViewsConfig
cfg = DataConfig(**json.loads(sys.argv[1]))
places = dict(rank=0, world_size=1, device=torch.device("cpu"), num_threads=1)
loader = build_loader(
    open_train_images(cfg), cfg, ViewsConfig(recipe="mio_small", size_px=16), seed=5, **places
)
found = hashlib.sha256()
for batch in loader.epoch(0):
    for tensor in (batch.sample_ids, batch.labels, *batch.views):
        found.update(tensor.contiguous().numpy().tobytes())
loader.close()
print(found.hexdigest())
"""


def start_an_epoch(**settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ_AN_EPOCH, json.dumps(SETTINGS | settings)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_what_they_fetch(folder, tmp_path):
    with FaultServer(folder) as server:
        place = {"train": server.url, "cache_dir": str(tmp_path), "cache_gb": 0.1}
        processes = [start_an_epoch(**place) for _ in range(2)]
        done = [process.communicate(timeout=100) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], done
        assert done[0] == done[1]
        asked = Counter((request.path, request.range) for request in server.requests if request.range)
        assert len(asked) > 128
        assert set(asked.values()) == {1}


def opened(server: FaultServer, cache: BlockCache | None = None, **settings: Any) -> ShardedImages:
    """The data set of a server, with short time-outs."""
    store = RemoteStore(server.url, **QUICK | settings)
    manifest = Manifest.from_json(store.get_whole(MANIFEST_NAME, 1 << 20)[0], MANIFEST_NAME)
    return ShardedImages(store.shown, manifest, RemoteFiles(store, manifest, cache))


@pytest.fixture
def server(folder) -> Iterator[FaultServer]:
    """Serves a copy in memory, whose manifest has the server's versions."""
    with FaultServer(contents(folder)) as server:
        set_versions(server)
        yield server


def set_versions(server: FaultServer) -> None:
    assert isinstance(server.files, dict)
    manifest = Manifest.from_json(server.files[MANIFEST_NAME], MANIFEST_NAME)
    shards = tuple(replace(shard, etag=server.etag(shard.name)) for shard in manifest.shards)
    server.files[MANIFEST_NAME] = replace(manifest, shards=shards).to_json()


@pytest.mark.parametrize("name", [SECOND, f"{THIRD}.rows"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("cut", "connection cut"),
        ("429", "status 429"),
        ("500", "status 500"),
        ("503", "status 503"),
        ("silence", "no answer in time"),
        ("stall", "no answer in time"),
        ("flip", "wrong checksum"),
    ],
)
def test_what_passes_is_repeated_and_counted(build, server, expected, name, fault, reason):
    images = opened(server)
    server.plan(name, "ok", fault)
    assert_same(batches_of(build(images)), expected)
    assert images.retries == {reason: 1}


def test_a_flipped_byte_of_the_manifest_is_asked_for_again(server):
    server.plan(MANIFEST_NAME, "flip")
    images = open_sharded(server.url)
    assert images.num_samples == NUM
    assert images.retries == {"wrong checksum": 1}
    server.plan(MANIFEST_NAME, "flip", "flip")
    with pytest.raises(DataError, match="not a manifest"):
        open_sharded(server.url)


def test_the_first_batch_waits_for_its_own_window_alone(server, monkeypatch):
    """Later ones do not: the next window is under way."""
    order = LanesOrder(opened(server), global_batch_size=SIZE, num_lanes=LANES, window_bytes=10**5, seed=1)
    gather, under_way = LaneStream._gather, []

    def recorded(stream: LaneStream, *arguments: Any) -> Samples:
        under_way.append(sorted(number for _, number in stream._windows))
        return gather(stream, *arguments)

    monkeypatch.setattr(LaneStream, "_gather", recorded)
    with closing(order.epoch(0, 0, 0, 1)) as samples:
        for _ in islice(samples.groups(), 2):
            pass
    assert under_way[0] == [0]
    assert under_way[1][:2] == [0, 1]


def test_random_order_fetches_each_image_alone(build, server, tmp_path):
    images = opened(server, BlockCache(tmp_path, 100 << 20))
    batches = batches_of(build(images, order="random", cache_dir=str(tmp_path), cache_gb=0.1))
    asked = [request for request in server.requests if request.path.endswith(".beton")]
    assert len(asked) == sum(len(batch[0]) for batch in batches)


def test_a_mixture_counts_the_retries_of_its_sources_and_says_beforehand_what_it_fetches(build, server, folder):
    """One of two sources of equal weights and sizes is remote: in an epoch, as many images as it has."""
    server.plan(SECOND, "500")
    mixed = (WeightedImages(path=server.url), WeightedImages(path=str(folder)))
    cfg = DataConfig(**SETTINGS | {"train": mixed})
    places = {"rank": 0, "world_size": 1, "device": CPU, "num_threads": 1}
    images, remote = open_train_images(cfg), open_images(server.url)
    assert isinstance(remote, ShardedImages)
    num_bytes = remote.manifest.image_bytes + NUM * ROW.itemsize
    with closing(build_loader(images, cfg, VIEWS, seed=5, **places)) as loader:
        line = remote_line(images, cfg, loader, 1)
        assert line is not None
        assert line.startswith(
            f"{server.url}: 3 shards, {NUM} images, {num_bytes / 1e9:.3g} GB; an epoch fetches "
            f"{num_bytes / 1e9:.3g} GB per node; no cache (data.cache_dir)"
        )
        before_mb = float(line.split("; ")[-1].split()[0])
        assert 0 < before_mb <= remote.manifest.image_bytes / 1e6
        assert loader.remote_retries == {}
        batches_of(loader)
        assert loader.remote_retries == {"status 500": 1}


# Rows and images of one block that are wrong at once are fetched again at once: so each for itself.
@pytest.mark.parametrize(("name", "faults"), [(THIRD, ("ok", "flip", "ok", "flip")), (f"{THIRD}.rows", ("flip",))])
def test_a_flipped_byte_does_not_stay_in_the_cache(build, server, expected, tmp_path, name, faults):
    server.plan(name, *faults)
    images = opened(server, BlockCache(tmp_path, 100 << 20))
    assert_same(batches_of(build(images)), expected)
    assert images.retries == {"wrong checksum": faults.count("flip")}
    num = len(server.requests)
    assert_same(batches_of(build(images)), expected)
    assert len(server.requests) == num


def damage(server: FaultServer, shard: int, samples: list[int]) -> None:
    """Change one byte of some stored images."""
    assert isinstance(server.files, dict)
    name = (FIRST, SECOND, THIRD)[shard]
    rows = np.frombuffer(server.files[f"{name}.rows"], ROW)
    content = bytearray(server.files[name])
    for i in samples:
        content[int(rows["ptr"][i]) + 7] ^= 1
    server.files[name] = bytes(content)


@pytest.mark.parametrize(("engine", "order"), [("ffcv", "lanes"), ("ffcv", "random"), ("resident", "lanes")])
def test_an_image_that_stays_wrong_is_replaced_and_counted(build, server, tmp_path, engine, order, capfd):
    """Images 0..2 of the second shard are 203..205 of all: 206 takes their place, with a line each."""
    settings: dict[str, Any] = {"engine": engine, "order": order, "max_bad_fraction": 0.01}
    if order == "random":  # needs a cache that holds all
        settings |= {"cache_dir": str(tmp_path / "cache"), "cache_gb": 0.1}
    right = batches_of(build(opened(server), **settings))
    damage(server, 1, [0, 1, 2])
    images = opened(server)
    loader = build(images, **settings)
    wrong = {203, 204, 205}
    for batch, other in zip(batches_of(loader), right, strict=True):
        is_wrong = torch.isin(other[0], torch.tensor(sorted(wrong)))
        assert torch.equal(batch[0], torch.where(is_wrong, 206, other[0]))
        assert torch.equal(batch[2][~is_wrong], other[2][~is_wrong])
    met = wrong if engine == "resident" else wrong & {int(i) for batch in right for i in batch[0]}
    assert len(met) >= 2
    assert set(loader.bad_samples.reasons) >= met
    err = capfd.readouterr().err.splitlines()
    assert len(err) == len(loader.bad_sample_ids)
    assert all("has another checksum than its rows file says; image 20" in line for line in err)
    assert images.retries["wrong checksum"] >= 2
    with pytest.raises(DataError, match=r"more than data\.max_bad_fraction=0\.001 allows"):
        batches_of(build(opened(server), **settings | {"max_bad_fraction": 0.001}))


def test_where_no_image_may_be_replaced_one_that_stays_wrong_ends_the_work(server):
    damage(server, 1, [0])
    images = opened(server)
    for read in (images.samples, images.few):
        assert read(np.array([202, 204])).ids.tolist() == [202, 204]
        with pytest.raises(DataError, match=r"image 203 has another checksum than its rows file says: copy its shard"):
            read(np.array([203]))


def changed_shard(server: FaultServer) -> None:
    server.plan(THIRD, "ok", "ok", "changed")


def cut_shard(server: FaultServer) -> None:
    assert isinstance(server.files, dict)
    server.files[THIRD] = server.files[THIRD][:200_000]
    set_versions(server)


def cut_rows(server: FaultServer) -> None:
    assert isinstance(server.files, dict)
    server.files[f"{THIRD}.rows"] = server.files[f"{THIRD}.rows"][:2000]


def lose_shard(server: FaultServer) -> None:
    assert isinstance(server.files, dict)
    del server.files[THIRD]


def lose_rows(server: FaultServer) -> None:
    assert isinstance(server.files, dict)
    del server.files[f"{THIRD}.rows"]


def other_shard(server: FaultServer) -> None:
    """The shard and its rows under the manifest's version, but of other images."""
    assert isinstance(server.files, dict)
    server.files[THIRD] = bytes(255 - value for value in server.files[THIRD][:1000]) * 3000


def forbid(server: FaultServer) -> None:
    server.always(THIRD, "403")


def fail_always(server: FaultServer) -> None:
    server.always(THIRD, "500")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed_shard, rf"{THIRD}: has changed since its manifest was written; run\.resume=auto resumes a training"),
        (cut_shard, rf"{THIRD}: is shorter than the manifest says"),
        (cut_rows, rf"{THIRD}\.rows: is shorter than the manifest says"),
        (lose_shard, rf"{THIRD}: no such object"),
        (lose_rows, rf"{THIRD}\.rows: no such object"),
        (other_shard, rf"{THIRD}: has changed since its manifest was written"),
        (forbid, rf"{THIRD}: not allowed \(403\): check the credentials and the object's name"),
        (fail_always, rf"{THIRD}: status 500, 3 tries"),
    ],
)
def test_what_does_not_pass_ends_in_one_line(build, server, spoil, message, expected):
    spoil(server)
    loader = build(opened(server, max_tries=3))
    found = []
    with pytest.raises(DataError, match=message) as caught, closing(loader.epoch(0)) as batches:
        found.extend((batch.sample_ids, batch.labels, *batch.views) for batch in batches)
    assert str(caught.value).isprintable()
    assert len(found) < NUM_BATCHES
    for batch, other in zip(found, expected, strict=False):
        assert torch.equal(batch[0], other[0])


def test_a_shard_of_other_images_under_its_old_version_is_damaged(build, server, folder, capfd):
    """A server that does not know versions: checksums tell."""
    assert isinstance(server.files, dict)
    server.files |= {MANIFEST_NAME: (folder / MANIFEST_NAME).read_bytes(), THIRD: bytes(len(server.files[THIRD]))}
    with pytest.raises(DataError, match=r"more than data\.max_bad_fraction=0\.001 allows"):
        batches_of(build(opened(server)))


def test_a_full_disk_costs_requests_and_no_byte(build, server, expected, tmp_path, monkeypatch, capfd):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_all", full)
    cache = BlockCache(tmp_path, 100 << 20)
    assert_same(batches_of(build(opened(server, cache))), expected)
    assert cache.num_uncached == cache.num_fetched > 200
    assert capfd.readouterr().err.count("\n") == 1


HOLD_LOCKS = """
import fcntl, os, signal, sys
from pathlib import Path
files = [open(Path(sys.argv[1]) / name, "w") for name in ["evict", *(f"block-{i}" for i in range(1024))]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_process_that_is_stopped_with_locks_does_not_stop_a_training(build, server, expected, tmp_path):
    cache = BlockCache(tmp_path, 100 << 20, max_wait_s=0.05)
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCKS, str(tmp_path / "fastssl-blocks/locks")])
    try:
        os.waitpid(holder.pid, os.WUNTRACED)
        assert_same(batches_of(build(opened(server, cache))), expected)
        assert cache.num_uncached == cache.num_fetched > 200
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()


def test_an_epoch_that_is_left_does_not_wait_for_the_server(build, server):
    for name in (FIRST, SECOND, THIRD):
        server.plan(name, *["ok"] * 6)
        server.always(name, "silence")
    images = opened(server, silence_s=60.0)
    loader = build(images)
    batches = loader.epoch(0)
    batches.close()
    loader.close()
    images.files.close()


# ------------------------------------------------------------------ manifests that do not fit


def local_copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 24)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (THIRD, lose, rf"{THIRD}: no such file, but the manifest of its data set lists it"),
        (f"{THIRD}.rows", lose, rf"{THIRD}\.rows: no such file"),
        (THIRD, cut, rf"{THIRD}: not the file of the manifest \([0-9,]+ bytes instead of [0-9,]+\): copy it again"),
        (f"{THIRD}.rows", cut, rf"{THIRD}\.rows: not the file of the manifest \(304 rows instead of 305\)"),
    ],
)
def test_a_shard_that_is_not_the_manifests(build, folder, tmp_path, name, spoil, message):
    copy = local_copy(folder, tmp_path)
    spoil(copy / name)
    for order in ("lanes", "random"):
        with pytest.raises(DataError, match=message):
            batches_of(build(copy, order=order))


def test_a_manifest_of_another_data_set(build, folder, tmp_path):
    copy = local_copy(folder, tmp_path)
    (copy / FIRST).rename(copy / "first")
    shutil.copy(copy / THIRD, copy / FIRST)
    with pytest.raises(DataError, match=rf"{FIRST}: not the file of the manifest"):
        batches_of(build(copy))


def with_other_labels(path: Path) -> None:
    """The rows file as of the same images converted with other labels."""
    rows, content = np.fromfile(path, ROW), path.with_suffix("").read_bytes()
    rows["label"] = (rows["label"] + 1) % 3
    for row in rows:
        head, ptr = row.tobytes()[:HEAD_BYTES], int(row["ptr"])
        row["crc32"] = row_crc32(head, content[ptr : ptr + (int(row["num_bytes"]) & MAX_IMAGE_BYTES)])
    rows.tofile(path)


@pytest.mark.parametrize("order", ["lanes", "random"])
def test_a_manifest_of_a_data_set_of_the_same_sizes_with_other_labels(build, folder, tmp_path, order):
    copy = local_copy(folder, tmp_path)
    with_other_labels(copy / f"{SECOND}.rows")
    message = rf"{SECOND}\.rows: not the file of the manifest \(other images or labels\)"
    with pytest.raises(DataError, match=message):
        batches_of(build(copy, order=order))
    with pytest.raises(DataError, match=message):
        _ = open_images(copy).labels
    with FaultServer(contents(copy)) as server:
        set_versions(server)
        with pytest.raises(DataError, match=message):
            _ = opened(server).labels


def test_two_shards_of_one_name(folder, tmp_path):
    copy = local_copy(folder, tmp_path)
    path = copy / MANIFEST_NAME
    path.write_text(path.read_text().replace(SECOND, FIRST))
    with pytest.raises(DataError, match=rf"copy/dataset\.json: not a manifest \(it lists {FIRST} twice\)"):
        open_images(copy)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"a folder without dataset\.json: `fastssl manifest .*` writes it"):
        open_images(tmp_path)
    with pytest.raises(DataError, match="no file has such a name"):
        open_images(tmp_path / "*.beton")
    with FaultServer({}) as server, pytest.raises(DataError, match=r"dataset\.json: no such object \(`fastssl man"):
        open_images(f"{server.url}/x")


@pytest.mark.parametrize(
    "url",
    [
        "http://user-7f:word-7f@host/p",
        "https://user-7f@host/p",
        "https://host/p?X-Amz-Signature=sig-7f",
        "http://user-7f:wo/rd-7f@host/p",
        "http://user-7f:word-7f@[::1/p",
        "http://user-7f:word-7f@host:port/p",
        "s3://key-7f:word-7f@bucket/p",
        "S3://bucket/p?token=token-7f",
        "abfss://container:word-7f@account.dfs.core.windows.net/p",
    ],
)
@pytest.mark.parametrize("field", ["train", "test"])
def test_a_url_with_something_secret_is_no_part_of_a_configuration(url, field):
    with pytest.raises(ValueError, match=rf"^{field}: \w+://…: .* belong into ~/\.netrc, keys and tokens of") as caught:
        DataConfig(**{field: url})
    assert "7f" not in str(caught.value)
    for good in ("s3://bucket/a%40b", "https://host/p", "abfss://c@account.dfs.core.windows.net/p"):
        DataConfig(**{field: good})
    DataConfig(**{field: "/data/a@b?c/x.beton"})


# ------------------------------------------------------------------ files that change while in use


@pytest.mark.parametrize("order", ["lanes", "random"])
@pytest.mark.parametrize("engine", ["ffcv", "torch", "dali"])
def test_no_batch_of_a_shard_that_was_overwritten_is_given(build, folder, tmp_path, engine, order):
    copy = local_copy(folder, tmp_path)
    settings = {"engine": engine, "order": order, "prefetch_batches": 1}
    right = batches_of(build(folder, **settings))
    found = []
    with closing(build(copy, **settings).epoch(0)) as epoch:
        batches = ((batch.sample_ids, batch.labels, *(view.clone() for view in batch.views)) for batch in epoch)
        found += islice(batches, 4)
        with (copy / THIRD).open("r+b") as file:
            file.write(bytes((copy / THIRD).stat().st_size))
        with pytest.raises(DataChangedError, match=rf"{THIRD}: was written to while in use: restore it, then start"):
            found.extend(batches)
    assert 4 <= len(found) < NUM_BATCHES
    assert_same(found, right[: len(found)])


# Reads shards through one engine, without the loader's checks, and cuts one short after the first batch.
CUT_SHORT = """
import os, sys
import numpy as np
import torch
from pipelines.engines import build_engine
from pipelines.shards.open_images import open_images
from pipelines.views import ViewsConfig, build_view_specs, size_groups
from tests.helpers.plans import draw_of, plan_batches

folder, shard, engine = sys.argv[1:]
images, specs = open_images(folder), build_view_specs(ViewsConfig(recipe="weak", size_px=16))
engine = build_engine(engine, images, num_workers=2, prefetch_batches=1, device=torch.device("cpu"))
plans = plan_batches(draw_of(specs), np.arange(images.num_samples), images, 4)
for number, _ in enumerate(engine.batches(plans, 4, size_groups(specs))):
    print(number, flush=True)
    os.truncate(os.path.join(folder, shard), 4096)
"""


@pytest.mark.parametrize("engine", ["ffcv", "dali", "torch"])
def test_a_map_that_cannot_be_read_ends_the_process_with_one_line(folder, tmp_path, engine):
    copy = local_copy(folder, tmp_path)
    command = [sys.executable, "-c", CUT_SHORT, str(copy), FIRST, engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("0\n")
    assert done.stderr.startswith(f"fastssl: error: {copy / FIRST}: was cut short, or cannot be read any more: restore")
    assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------ a billion images

OPEN_A_BILLION = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
import torch
from pipelines.loader import open_train_images, DataConfig
from pipelines.order.lanes import LaneOrder
from pipelines.shards.lane_reader import LanesOrder, LaneStream

def read_bytes(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024

small = LaneOrder(num_samples=10_000, block_samples=8, num_lanes=4, window_blocks=16, seed=0, epoch=0)
small.batch(0, 64)  # compiles or loads what is compiled
LaneOrder(num_samples=10**6, block_samples=38, num_lanes=4, window_blocks=500, seed=0, epoch=0).batch(0, 64)
Path("/proc/self/clear_refs").write_text("5")
before, start_s = read_bytes("VmRSS"), time.perf_counter()
images = open_train_images(DataConfig(train=sys.argv[1]))
lanes = LanesOrder(images, global_batch_size=4096, num_lanes=64, window_bytes=1024_000_000, seed=0)
order = lanes._order_of(3)
first = order.batch(lanes.num_batches // 2, 4096, 1, 8)
start_s = time.perf_counter() - start_s
begun_s = time.perf_counter()
steps = range(100_000, 101_000)
met = sum(len(order.batch(step, 4096, 1, 8)) for step in steps)
print(json.dumps({
    "start_s": start_s, "bytes": read_bytes("VmHWM") - before, "us": (time.perf_counter() - begun_s) / met * 1e6,
    "num": images.num_samples, "first": [len(set(first.tolist())), int(first.min()), int(first.max())],
}))
"""


def test_a_billion_images_are_opened_in_seconds(tmp_path):
    manifest = Manifest.from_json(simulated_manifest(), MANIFEST_NAME)
    (tmp_path / MANIFEST_NAME).write_bytes(manifest.to_json())
    command = [sys.executable, "-c", OPEN_A_BILLION, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["num"] == 10**9
    assert found["start_s"] < 5
    assert found["bytes"] < 200e6
    assert found["us"] < 3
    num, least, most = found["first"]
    assert (num, least >= 0, most < 10**9) == (512, True, True)
    assert most > 10**8


def simulated_manifest() -> bytes:
    """10^9 images of 110 kB in 4,000 shards that are nowhere."""
    from pipelines.shards.manifest import Shard

    shards = tuple(
        Shard(
            name=f"part-{k:05d}-of-04000.beton",
            num_images=250_000,
            num_bytes=27_600_000_000 + k,
            image_bytes=27_500_000_000,
            num_raw=0,
            rows_sha256=f"{k:064x}",
            etag=f'"{k:032x}-17"',
        )
        for k in range(4000)
    )
    return Manifest(shards, [f"class {k}" for k in range(1000)], [10**6] * 1000).to_json()


def test_the_order_of_a_reader_is_the_order_of_its_numbers(folder):
    images = open_images(folder)
    assert isinstance(images, ShardedImages)
    for num_lanes in (1, 2, 4, 8, 16):
        order = LanesOrder(images, global_batch_size=SIZE, num_lanes=num_lanes, window_bytes=10**6, seed=1)
        assert order.window_bytes <= 1.5 * 10**6
        assert 0 < order.first_batch_bytes <= order.window_bytes
        for epoch in range(2):
            with closing(order.epoch(epoch, 0, 0, 1)) as samples:
                ids = np.concatenate([group.samples.ids for group in samples.groups()])
            assert len(np.unique(ids)) == len(ids) == order.num_batches * SIZE
