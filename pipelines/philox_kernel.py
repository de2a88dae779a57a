"""Philox's rounds in numba: ten times as fast as numpy, and without the GIL, which the decoding threads need.

This is a separate file because `pipelines.philox` imports it when the first number is drawn, so that reading a
configuration does not load numba.
"""

import numpy as np
from numba import njit

# Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, Table 2.
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_NUM_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


@njit("UniTuple(uint64, 4)(uint64, uint64, uint64, uint64, uint64, uint64)", nogil=True, cache=True)
def philox4x32_block(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, key_0: np.uint64, key_1: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """The four random words of one counter; all arguments are 32-bit words. For other numba functions."""
    for _ in range(_NUM_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0 = (product_1 >> _WORD_BITS) ^ c1 ^ key_0
        c2 = (product_0 >> _WORD_BITS) ^ c3 ^ key_1
        c1, c3 = product_1 & _LOW_WORD, product_0 & _LOW_WORD
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW_WORD, (key_1 + _WEYL_1) & _LOW_WORD
    return c0, c1, c2, c3


@njit("void(uint64[:, ::1], uint64, uint64)", nogil=True, cache=True)
def philox4x32_in_place(counters: np.ndarray, key_0: np.uint64, key_1: np.uint64) -> None:
    """Replace every counter by its random words.

    Args:
        counters: uint64 [num, 4], each a 32-bit word; overwritten with uniform 32-bit words.
        key_0, key_1: 32-bit words.
    """
    for i in range(len(counters)):
        counters[i, 0], counters[i, 1], counters[i, 2], counters[i, 3] = philox4x32_block(
            counters[i, 0], counters[i, 1], counters[i, 2], counters[i, 3], key_0, key_1
        )
