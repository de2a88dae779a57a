"""The keyed permutation in numba; imported when the first order is computed, as `pipelines.philox_kernel` is."""

import numpy as np
from numba import njit

from pipelines.philox_kernel import philox4x32_block

_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_ONE = np.uint64(1)


@njit("void(uint64[::1], uint64[::1], uint64, uint64, uint64, uint64, int64, boolean)", nogil=True, cache=True)
def permute_in_place(
    values: np.ndarray,
    streams: np.ndarray,
    num: np.uint64,
    seed: np.uint64,
    epoch: np.uint64,
    address: np.uint64,
    num_rounds: int,
    backward: bool,
) -> None:
    """Replace every value by its image under the keyed permutation of [0, num), or under the inverse.

    Args:
        values: uint64 [n], each below num; overwritten.
        streams: uint64 [n], or [1] for all values; each a 32-bit word.
        num: In 2..2**62.
        seed: The key, 64 bits.
        epoch: A 32-bit word.
        address: The counter's last word for round 0; round r has address + r.
        num_rounds: Rounds of the network.
        backward: Compute the inverse.
    """
    num_bits = np.uint64(0)
    while (num - _ONE) >> num_bits:
        num_bits += _ONE
    # Even rounds change the low half, odd rounds the high half, which has one bit more where num_bits is odd.
    low_bits = num_bits >> _ONE
    low_mask, high_mask = (_ONE << low_bits) - _ONE, (_ONE << (num_bits - low_bits)) - _ONE
    key_0, key_1 = seed & _LOW_WORD, seed >> _WORD_BITS
    for i in range(len(values)):
        stream = streams[i] if len(streams) > 1 else streams[0]
        x = values[i]
        while True:
            high, low = x >> low_bits, x & low_mask
            for step in range(num_rounds):
                r = num_rounds - 1 - step if backward else step
                if r & 1:
                    word = philox4x32_block(low, stream, epoch, address + np.uint64(r), key_0, key_1)[0]
                    high = (high ^ word) & high_mask
                else:
                    word = philox4x32_block(high, stream, epoch, address + np.uint64(r), key_0, key_1)[0]
                    low = (low ^ word) & low_mask
            x = high << low_bits | low
            if x < num:
                break
        values[i] = x
