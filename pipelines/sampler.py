"""The order of the samples: pure functions of (seed, epoch), the same for every rank and world size."""

# N samples, G global batch, W world size

import numpy as np

from pipelines.philox import random_words

# Views are numbered from 0; the last view number is reserved for the sampler, so its random numbers are never a view's.
SAMPLER_VIEW = 0xFFFF
_SHUFFLE_OP, _HOLDOUT_OP, _CHUNK_OP = 0, 1, 2
# The hold-out must be the same in every run, whatever the seed.
_HOLDOUT_SEED, _HOLDOUT_EPOCH = 0, 0
# Size of one read in quasi-random order: large enough that a hard disk spends most of the time reading, not seeking.
CHUNK_BYTES = 4 << 20


def epoch_order(ids: np.ndarray, seed: int, epoch: int, windows: np.ndarray | None = None) -> np.ndarray:
    """Return the samples in the order in which one epoch visits them.

    A sample's position is the rank of its 64-bit Philox key. No library's shuffle is used, so the order is the same
    with every version of numpy.

    Args:
        ids: Sample ids, int64 [N].
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32).
        windows: `quasi_random_windows` of all samples: one window after the other, each in random order; None: all
            samples in random order.
    Returns:
        A permutation of ids, int64 [N].
    """
    ids = np.asarray(ids, np.int64)
    keys = _sort_keys(ids, seed, epoch, _SHUFFLE_OP)
    return ids[np.argsort(keys, kind="stable") if windows is None else np.lexsort((keys, windows[ids]))]


def quasi_random_windows(
    data_ptr: np.ndarray, data_bytes: np.ndarray, seed: int, epoch: int, window_bytes: int
) -> np.ndarray:
    """Assign each sample to a window of the quasi-random order: the file's chunks are shuffled and form windows.

    A window's chunks come from random places of the file, and each is read whole and only once. Within a window,
    samples are in random order. The result depends only on the file and (seed, epoch), not on ranks.

    Args:
        data_ptr: Offsets of the samples in the file, uint64 [N].
        data_bytes: Sizes of the samples in bytes, uint64 [N].
        seed: The run's seed.
        epoch: The epoch.
        window_bytes: Approximate stored size of a window's samples; a window consists of whole chunks of `CHUNK_BYTES`.
    Returns:
        Window index of each sample, int64 [N], from 0.
    """
    chunks, chunk_of = np.unique(data_ptr // np.uint64(CHUNK_BYTES), return_inverse=True)
    order = np.argsort(_sort_keys(chunks.astype(np.int64), seed, epoch, _CHUNK_OP), kind="stable")
    num_bytes = np.bincount(chunk_of, weights=data_bytes)[order]
    window_of_chunk = np.empty(len(chunks), np.int64)
    window_of_chunk[order] = (np.cumsum(num_bytes) - num_bytes) // window_bytes
    return window_of_chunk[chunk_of]


def global_batches(
    ids: np.ndarray, seed: int, epoch: int, global_batch_size: int, windows: np.ndarray | None = None
) -> np.ndarray:
    """Divide one epoch into global batches; an incomplete last batch is dropped.

    Args:
        ids: Sample ids, int64 [N].
        seed: The run's seed.
        epoch: The epoch.
        global_batch_size: G, >= 1.
        windows: See `epoch_order`.
    Returns:
        int64 [N // G, G].
    Raises:
        ValueError: G < 1, or fewer than G samples.
    """
    if not 1 <= global_batch_size <= len(ids):
        raise ValueError(f"global_batch_size must be in 1..{len(ids)} (the number of samples), got {global_batch_size}")
    num_batches = len(ids) // global_batch_size
    order = epoch_order(ids, seed, epoch, windows)
    return order[: num_batches * global_batch_size].reshape(num_batches, global_batch_size)


def local_rows(batches: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the local batches of one rank: the contiguous slice `rank` of every global batch.

    Args:
        batches: int64 [num_batches, G].
        rank: In [0, W).
        world_size: W, a divisor of G.
    Returns:
        int64 [num_batches, G // W]; their concatenation over the ranks is `batches`.
    Raises:
        ValueError: rank is out of range, or G is not divisible by W.
    """
    global_batch_size = batches.shape[1]
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if global_batch_size % world_size:
        raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of the world size {world_size}")
    local_batch_size = global_batch_size // world_size
    return batches[:, rank * local_batch_size : (rank + 1) * local_batch_size]


def split_holdout(num_samples: int, fraction: float, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Split off a fixed hold-out, the same for every seed; stratified if labels are known.

    Exactly round(N * fraction) samples are held out. Each class contributes its share, rounded by largest remainder.

    Args:
        num_samples: N.
        fraction: Fraction to hold out, in [0, 1).
        labels: int64 [N] or None; -1 (no label) counts as a separate class.
    Returns:
        (fit_ids, holdout_ids), int64, each ascending; disjoint, and together 0..N-1.
    Raises:
        ValueError: fraction out of range, or labels of another length.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    classes = np.zeros(num_samples, np.int64) if labels is None else np.asarray(labels)
    if classes.shape != (num_samples,):
        raise ValueError(f"labels must have shape ({num_samples},), got {classes.shape}")
    _, class_index, class_counts = np.unique(classes, return_inverse=True, return_counts=True)
    ids = np.arange(num_samples, dtype=np.int64)
    keys = _sort_keys(ids, _HOLDOUT_SEED, _HOLDOUT_EPOCH, _HOLDOUT_OP)
    grouped = np.lexsort((keys, class_index))  # sorted by class, in random order within a class
    place_in_class = np.empty(num_samples, np.int64)
    place_in_class[grouped] = ids - np.repeat(np.cumsum(class_counts) - class_counts, class_counts)
    held_out = place_in_class < _class_shares(class_counts, fraction)[class_index]
    return ids[~held_out], ids[held_out]


def _class_shares(class_counts: np.ndarray, fraction: float) -> np.ndarray:
    """Integers near counts * fraction that sum to round(sum(counts) * fraction), by largest remainder."""
    exact = class_counts * fraction
    shares = np.floor(exact).astype(np.int64)
    num_missing = round(float(class_counts.sum()) * fraction) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:num_missing]] += 1
    return shares


def _sort_keys(ids: np.ndarray, seed: int, epoch: int, op: int) -> np.ndarray:
    words = random_words(seed, epoch, ids, SAMPLER_VIEW, op, num_blocks=1)
    return words[:, 0] << np.uint64(32) | words[:, 1]
