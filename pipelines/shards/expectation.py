"""What a training on remote shards will fetch, in numbers and as a line."""

from dataclasses import dataclass

from pipelines.epoch_order import EpochOrder, KeyedOrder
from pipelines.printable import printable
from pipelines.shards.lane_reader import LanesOrder
from pipelines.shards.mixed_images import MixedImages, MixedOrder
from pipelines.shards.rows import ROW
from pipelines.shards.sharded_images import ShardedImages


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is fetched of remote data.

    Attributes:
        name: The data set, or the remote ones of a mixture.
        num_shards: Number of shards.
        num_images: Number of images.
        all_bytes: Images and rows of all shards: a cache of this size holds all.
        epoch_bytes: What a node fetches in an epoch without a cache, about.
        first_bytes: What all nodes together fetch before the first batch, about.
    """

    name: str
    num_shards: int
    num_images: int
    all_bytes: int
    epoch_bytes: int
    first_bytes: int


def expect(
    images: ShardedImages | MixedImages, order: EpochOrder, *, global_batch_size: int, num_nodes: int
) -> Expectation:
    """What a training in this order fetches.

    Args:
        images: The data set, or a mixture with a remote one.
        order: Lanes, of which each process reads its own, or random, in which each node needs all.
        global_batch_size: G.
        num_nodes: Number of nodes, which do not share what they fetch.
    """
    if isinstance(images, MixedImages):
        assert isinstance(order, MixedOrder)
        return _expect_mixture(images, order, global_batch_size, num_nodes)
    all_bytes = _all_bytes(images)
    if isinstance(order, LanesOrder):
        first_bytes, num_shares = order.first_batch_bytes, num_nodes
    else:
        assert isinstance(order, KeyedOrder)
        first_bytes, num_shares = global_batch_size * all_bytes // images.num_samples, 1
    return _of([images], epoch_bytes=all_bytes // num_shares, first_bytes=first_bytes)


def _expect_mixture(images: MixedImages, order: MixedOrder, global_batch_size: int, num_nodes: int) -> Expectation:
    """Of the remote sources, each by its share of the images of an epoch."""
    shares = images.mixture.counts / images.mixture.period
    epoch_bytes = first_bytes = 0.0
    for source, own, share in zip(images.sources, order.orders, shares.tolist(), strict=True):
        if isinstance(source, ShardedImages) and source.is_remote:
            assert own is not None
            epoch_bytes += share * images.num_samples * _all_bytes(source) / source.num_samples / num_nodes
            first_bytes += own.bytes_before(share * global_batch_size)
    return _of(images.remote_sources, epoch_bytes=round(epoch_bytes), first_bytes=round(first_bytes))


def _of(remote: list[ShardedImages], *, epoch_bytes: int, first_bytes: int) -> Expectation:
    return Expectation(
        name=" + ".join(str(each.path) for each in remote),
        num_shards=sum(len(each.manifest.shards) for each in remote),
        num_images=sum(each.num_samples for each in remote),
        all_bytes=sum(map(_all_bytes, remote)),
        epoch_bytes=epoch_bytes,
        first_bytes=first_bytes,
    )


def _all_bytes(images: ShardedImages) -> int:
    return images.manifest.image_bytes + images.num_samples * ROW.itemsize


def describe_expectation(found: Expectation, cache_bytes: int | None) -> str:
    """One line for the start of a training; `cache_bytes` is None without `data.cache_dir`."""
    if cache_bytes is None:
        cache = "no cache (data.cache_dir), so each epoch fetches it again"
    elif cache_bytes >= found.all_bytes:
        cache = f"the cache of {cache_bytes / 1e9:.4g} GB (data.cache_gb) holds all of it"
    else:
        cache = (
            f"the cache of {cache_bytes / 1e9:.4g} GB (data.cache_gb) holds {cache_bytes / found.all_bytes:.0%} of all"
        )
    return printable(
        f"{found.name}: {found.num_shards:,} shards, {found.num_images:,} images, "
        f"{found.all_bytes / 1e9:.3g} GB; an epoch fetches {found.epoch_bytes / 1e9:.3g} GB per node; {cache}; "
        f"{found.first_bytes / 1e6:,.3g} MB come before the first batch"
    )
