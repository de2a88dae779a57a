"""Philox4x32-10, the counter-based generator used for all random choices of a run.

A number depends only on its address: (seed, epoch, sample id, view, op). The generator has no state, so the draw of a
sample does not depend on the batch, the rank, the worker or earlier draws.
The counter's layout is fixed in docs/adr/0002-counter-based-draw.md; changing it changes every run.
"""

# B samples

from collections.abc import Sequence

import numpy as np

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
    from pipelines.philox_kernel import philox4x32_in_place

    words = np.stack(np.broadcast_arrays(*counter), -1)
    philox4x32_in_place(words.reshape(-1, 4), np.uint64(key[0]), np.uint64(key[1]))
    return tuple(np.moveaxis(words, -1, 0))


def random_words(
    seed: int,
    epoch: int | np.ndarray,
    sample_ids: np.ndarray,
    view: int,
    op: int,
    num_blocks: int,
    first_block: int = 0,
) -> np.ndarray:
    """Random 32-bit words of one op of one view, addressed by sample.

    Args:
        seed: The run's seed, in [0, 2**64).
        epoch: In [0, 2**32), of all samples, or of each, int64 [B].
        sample_ids: Non-negative integers [B].
        view: In [0, 2**16).
        op: In [0, 2**8).
        num_blocks: Blocks of four words; first_block + num_blocks <= 2**8.
        first_block: First block in the op's stream.
    Returns:
        uint64 [B, 4 * num_blocks], each a 32-bit word.
    Raises:
        ValueError: a part of the address is out of range.
    """
    _check_address(seed, epoch, view, op, first_block + num_blocks)
    from pipelines.philox_kernel import philox4x32_in_place

    ids = np.asarray(sample_ids).astype(np.uint64)[:, None]
    at = epoch[:, None] if isinstance(epoch, np.ndarray) else epoch
    words = np.empty((len(ids), num_blocks, 4), np.uint64)  # first contains the counters
    words[..., 0], words[..., 1], words[..., 2] = ids & _LOW_WORD, ids >> _WORD_BITS, at
    words[..., 3] = (view << 16 | op << 8 | first_block) + np.arange(num_blocks)
    philox4x32_in_place(words.reshape(-1, 4), np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32))
    return words.reshape(len(ids), 4 * num_blocks)


def uniform(
    seed: int, epoch: int | np.ndarray, sample_ids: np.ndarray, view: int, op: int, num: int, first_block: int = 0
) -> np.ndarray:
    """Uniform numbers of one op of one view, addressed by sample; arguments as in `random_words`.

    Returns:
        float64 [B, num] in [0, 1), multiples of 2**-32.
    """
    words = random_words(seed, epoch, sample_ids, view, op, -(-num // 4), first_block)
    return words[:, :num] * 2.0**-32


def _check_address(seed: int, epoch: int | np.ndarray, view: int, op: int, end_block: int) -> None:
    epochs = np.unique(epoch).tolist() if isinstance(epoch, np.ndarray) else [epoch]
    for each in epochs:
        if not 0 <= each < 1 << 32:
            raise ValueError(f"epoch must be in [0, 2**32), got {each}")
    limits = {"seed": (seed, 64), "view": (view, 16), "op": (op, 8), "block": (end_block - 1, 8)}
    for name, (value, num_bits) in limits.items():
        if not 0 <= value < 1 << num_bits:
            raise ValueError(f"{name} must be in [0, 2**{num_bits}), got {value}")
