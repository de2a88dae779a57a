"""A random order of [0, num) without an array of num: the sample at any position, and the position of any sample.

For num >= `SMALL` a Feistel network permutes [0, 2**b), where b is the number of bits of num - 1. A value outside of
[0, num) passes through the network again until it is inside ("cycle walking"; fewer than two passes on average). The
function of each round is one block of Philox4x32-10, with the address scheme of `pipelines.philox`:

| word | content |
|---|---|
| key 0, key 1 | seed, low and high 32 bits |
| counter 0 | the half that the round does not change |
| counter 1 | stream |
| counter 2 | epoch |
| counter 3 | the sampler's view << 16, op 3 << 8, round |

With four rounds, the XOR of adjacent samples fails a chi-square test; with five to eight it does not.

A network of few bits reaches only few of the permutations. Below `SMALL`, the order is therefore the ranks of 64-bit
keys (op 4, sample id | stream << 32), as in `pipelines.sampler.epoch_order`; the last orders are cached.
"""

# n positions, S streams

from functools import lru_cache

import numpy as np

from pipelines.philox import random_words
from pipelines.sampler import SAMPLER_VIEW

SMALL = 1 << 16  # from here on the network; below, the ranks of random keys
MAX_NUM = 1 << 62
NUM_ROUNDS = 8
# The sampler's ops 0 to 2 are in pipelines.sampler.
_NETWORK_OP, _RANK_OP = 3, 4
_NETWORK_ADDRESS = SAMPLER_VIEW << 16 | _NETWORK_OP << 8


def sample_at(positions: np.ndarray | int, num: int, seed: int, epoch: int, stream: int | np.ndarray = 0) -> np.ndarray:
    """Return the samples at some positions of a random order of [0, num).

    Orders of different seeds, epochs or streams are independent of each other.

    Args:
        positions: Integers in [0, num), any shape.
        num: Number of samples, in 1..2**62.
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32).
        stream: In [0, 2**32); if num >= `SMALL`, also an array that broadcasts to the positions.
    Returns:
        int64, shape of the positions.
    Raises:
        ValueError: a number is out of range.
    """
    return _mapped("positions", positions, num, seed, epoch, stream, backward=False)


def position_of(samples: np.ndarray | int, num: int, seed: int, epoch: int, stream: int | np.ndarray = 0) -> np.ndarray:
    """Return the positions of some samples: the inverse of `sample_at`, with the same arguments and errors."""
    return _mapped("samples", samples, num, seed, epoch, stream, backward=True)


def small_orders(num: int, seed: int, epoch: int, streams: np.ndarray) -> np.ndarray:
    """Return the whole orders of several streams.

    Args:
        num: In 1..SMALL-1.
        seed: The run's seed.
        epoch: The epoch.
        streams: int64 [S], each in [0, 2**32).
    Returns:
        int64 [S, num]; row s is sample_at(np.arange(num), num, seed, epoch, streams[s]).
    """
    ids = (streams[:, None] << 32 | np.arange(num)).reshape(-1)
    words = random_words(seed, epoch, ids, SAMPLER_VIEW, _RANK_OP, num_blocks=1)
    keys = words[:, 0] << np.uint64(32) | words[:, 1]
    return np.argsort(keys.reshape(len(streams), num), axis=1, kind="stable")


def _mapped(
    name: str,
    values: np.ndarray | int,
    num: int,
    seed: int,
    epoch: int,
    stream: int | np.ndarray,
    *,
    backward: bool,
) -> np.ndarray:
    values = np.asarray(values, np.int64)
    streams = np.asarray(stream, np.int64)
    if not 1 <= num <= MAX_NUM:
        raise ValueError(f"num must be in 1..2**62, got {num}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
    if streams.size and not (streams.min() >= 0 and streams.max() < 1 << 32):
        raise ValueError(f"stream must be in [0, 2**32), got {stream}")
    if values.size and not (values.min() >= 0 and values.max() < num):
        raise ValueError(f"{name} must be in [0, {num}), got {values.min()}..{values.max()}")
    if num < SMALL:
        if streams.ndim:
            raise ValueError(f"below {SMALL} samples, stream must be one number")
        order, inverse = _small_order(num, seed, epoch, int(stream))
        return (inverse if backward else order)[values].astype(np.int64)
    from pipelines.order.keyed_kernel import permute_in_place

    mapped = values.astype(np.uint64).reshape(-1)
    if streams.size != 1:
        streams = np.broadcast_to(streams, values.shape)
    permute_in_place(
        mapped,
        streams.astype(np.uint64).reshape(-1),
        np.uint64(num),
        np.uint64(seed),
        np.uint64(epoch),
        np.uint64(_NETWORK_ADDRESS),
        NUM_ROUNDS,
        backward,
    )
    return mapped.astype(np.int64).reshape(values.shape)


@lru_cache(maxsize=32)
def _small_order(num: int, seed: int, epoch: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """The order and its inverse, uint16 [num] each: at most 256 KiB."""
    order = small_orders(num, seed, epoch, np.array([stream]))[0]
    inverse = np.empty(num, np.uint16)
    inverse[order] = np.arange(num, dtype=np.uint16)
    return order.astype(np.uint16), inverse
