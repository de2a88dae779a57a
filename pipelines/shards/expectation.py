"""What a training on remote shards will fetch, in numbers and as a line."""

from dataclasses import dataclass

from pipelines.epoch_order import EpochOrder, KeyedOrder
from pipelines.printable import printable
from pipelines.shards.lane_reader import LanesOrder
from pipelines.shards.rows import ROW
from pipelines.shards.sharded_images import ShardedImages


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What is fetched of a remote data set.

    Attributes:
        all_bytes: Images and rows of all shards: a cache of this size holds all.
        epoch_bytes: What a node fetches in an epoch without a cache.
        first_bytes: What all nodes together fetch before the first batch, about.
    """

    all_bytes: int
    epoch_bytes: int
    first_bytes: int


def expect(images: ShardedImages, order: EpochOrder, *, global_batch_size: int, num_nodes: int) -> Expectation:
    """What a training in this order fetches.

    Args:
        images: The data set.
        order: Lanes, of which each process reads its own, or random, in which each node needs all.
        global_batch_size: G.
        num_nodes: Number of nodes, which do not share what they fetch.
    """
    num, all_bytes = images.num_samples, images.manifest.image_bytes + images.num_samples * ROW.itemsize
    if isinstance(order, LanesOrder):
        first_bytes, num_shares = order.first_batch_bytes, num_nodes
    else:
        assert isinstance(order, KeyedOrder)
        first_bytes, num_shares = global_batch_size * all_bytes // num, 1
    return Expectation(all_bytes=all_bytes, epoch_bytes=all_bytes // num_shares, first_bytes=first_bytes)


def describe_expectation(images: ShardedImages, found: Expectation, cache_bytes: int | None) -> str:
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
        f"{images.path}: {len(images.manifest.shards):,} shards, {images.num_samples:,} images, "
        f"{found.all_bytes / 1e9:.3g} GB; an epoch fetches {found.epoch_bytes / 1e9:.3g} GB per node; {cache}; "
        f"{found.first_bytes / 1e6:,.3g} MB come before the first batch"
    )
