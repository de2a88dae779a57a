"""Philox4x32-10, the counter-based generator behind every random choice of a run.

A number depends on its address only: (seed, epoch, sample id, view, op). No state is kept, so the draw of a
sample does not depend on the batch, the rank, the worker or what was drawn before it.
The counter's layout is fixed in docs/adr/0002-counter-based-draw.md; changing it changes every run.
"""

# B samples

from collections.abc import Sequence

import numpy as np

# Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, Table 2.
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


def philox4x32(counter: Sequence[np.ndarray], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 over arrays of counters.

    Args:
        counter: Four uint64 arrays of one shape (or broadcastable), each a 32-bit word.
        key: Two 32-bit words.
    Returns:
        Four uint64 arrays of that shape, each a uniform 32-bit word.
    """
    c0, c1, c2, c3 = counter
    for round_index in range(_NUM_ROUNDS):
        key_0 = np.uint64((key[0] + round_index * _WEYL_0) & 0xFFFFFFFF)
        key_1 = np.uint64((key[1] + round_index * _WEYL_1) & 0xFFFFFFFF)
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> _WORD_BITS) ^ c1 ^ key_0
        c2 = (product_0 >> _WORD_BITS) ^ c3 ^ key_1
        c1, c3 = product_1 & _LOW_WORD, product_0 & _LOW_WORD
    return c0, c1, c2, c3


def random_words(
    seed: int, epoch: int, sample_ids: np.ndarray, view: int, op: int, num_blocks: int, first_block: int = 0
) -> np.ndarray:
    """Random 32-bit words of one op of one view, addressed by sample.

    Args:
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32).
        sample_ids: Non-negative integers [B].
        view: In [0, 2**16).
        op: In [0, 2**8).
        num_blocks: Blocks of four words; first_block + num_blocks <= 2**8.
        first_block: Where in the op's stream to begin.
    Returns:
        uint64 [B, 4 * num_blocks], each a 32-bit word.
    Raises:
        ValueError: a part of the address is out of its range.
    """
    _check_address(seed, epoch, view, op, first_block + num_blocks)
    ids = np.asarray(sample_ids).astype(np.uint64)[:, None]
    blocks = np.arange(first_block, first_block + num_blocks, dtype=np.uint64)[None, :]
    counter = (
        np.broadcast_to(ids & _LOW_WORD, (len(ids), num_blocks)),
        ids >> _WORD_BITS,
        np.full((1, 1), epoch, np.uint64),
        np.uint64(view << 16 | op << 8) | blocks,
    )
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=-1).reshape(len(ids), 4 * num_blocks)


def uniform(
    seed: int, epoch: int, sample_ids: np.ndarray, view: int, op: int, num: int, first_block: int = 0
) -> np.ndarray:
    """Uniform numbers of one op of one view, addressed by sample; arguments as in `random_words`.

    Returns:
        float64 [B, num] in [0, 1), multiples of 2**-32.
    """
    words = random_words(seed, epoch, sample_ids, view, op, -(-num // 4), first_block)
    return words[:, :num] * 2.0**-32


def _check_address(seed: int, epoch: int, view: int, op: int, end_block: int) -> None:
    limits = {"seed": (seed, 64), "epoch": (epoch, 32), "view": (view, 16), "op": (op, 8), "block": (end_block - 1, 8)}
    for name, (value, num_bits) in limits.items():
        if not 0 <= value < 1 << num_bits:
            raise ValueError(f"{name} must be in [0, 2**{num_bits}), got {value}")
