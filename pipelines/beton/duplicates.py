"""Counts images that are copies of others, or that look almost like others, by their hashes."""

# N images of one file, Q images to look for

from typing import Any

import numpy as np
from numba import njit

# Of the 64 bits of a look. Of CIFAR-10's 10,000 test images, 185 have a training image within this distance, 98 % of
# them one of their class. The number of different bits is even, since half of each look's bits are set.
MAX_DISTANCE = 6
NUM_BANDS, BAND_BITS = 4, 16
MAX_SIMILAR_IMAGES = (
    3_000_000  # of more, only copies are counted: comparing looks takes time that grows with the square
)


def count_duplicates(hashes: np.ndarray) -> dict[str, Any]:
    """Count the images of a file that are there already, further up in the file.

    Args:
        hashes: uint64 [N, 2]; see `pipelines.convert.hashes.Hashes`.
    Returns:
        copies: number of images with the same content as an earlier one. similar: number of further images with a look
        within MAX_DISTANCE of that of an earlier one; None if N > MAX_SIMILAR_IMAGES.
    """
    content, look = hashes[:, 0], hashes[:, 1]
    _, first = np.unique(content, return_index=True)
    is_copy = np.ones(len(hashes), bool)
    is_copy[first] = False
    is_copy &= content != 0
    if len(hashes) > MAX_SIMILAR_IMAGES:
        return {"copies": int(is_copy.sum()), "similar": None}
    ids = np.arange(len(hashes))
    is_similar = _have_similar(look, ids, look, ids) & ~is_copy
    return {"copies": int(is_copy.sum()), "similar": int(is_similar.sum())}


def find_across(held_out: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images that are also among the training images.

    Args:
        held_out: Hashes, uint64 [Q, 2].
        train: Hashes, uint64 [N, 2].
    Returns:
        bool [Q] twice: which are copies of a training image, and which others look almost like one (none if
        Q > MAX_SIMILAR_IMAGES or N > MAX_SIMILAR_IMAGES).
    """
    is_copy = np.isin(held_out[:, 0], train[:, 0]) & (held_out[:, 0] != 0)
    if max(len(held_out), len(train)) > MAX_SIMILAR_IMAGES:
        return is_copy, np.zeros_like(is_copy)
    after_all = np.full(len(held_out), len(train))
    is_similar = _have_similar(held_out[:, 1], after_all, train[:, 1], np.arange(len(train)))
    return is_copy, is_similar & ~is_copy


def _have_similar(wanted: np.ndarray, before: np.ndarray, looks: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each wanted look, whether one of the looks with a smaller id than its `before` is within MAX_DISTANCE."""
    wanted, looks = np.ascontiguousarray(wanted, np.uint64), np.ascontiguousarray(looks, np.uint64)
    found = np.zeros(len(wanted), bool)
    for shift in np.arange(NUM_BANDS, dtype=np.uint64) * np.uint64(BAND_BITS):
        band = (looks >> shift).astype(np.uint16)
        order = np.argsort(band, kind="stable")
        starts = np.searchsorted(band[order], np.arange((1 << BAND_BITS) + 1))
        _search_band(wanted, before, looks[order], ids[order], starts, shift, found)
    return found


@njit(nogil=True, cache=True)
def _search_band(
    wanted: np.ndarray,
    before: np.ndarray,
    looks: np.ndarray,
    ids: np.ndarray,
    starts: np.ndarray,
    shift: int,
    found: np.ndarray,
) -> None:
    """Compare with the looks whose band differs in at most one bit.

    Looks that differ in at most 6 bits differ in at most one bit of one of the 4 bands.
    """
    for i in range(len(wanted)):
        if found[i] or wanted[i] == 0:
            continue
        own = np.int64((wanted[i] >> shift) & np.uint64(0xFFFF))
        for flip in range(-1, BAND_BITS):
            band = own if flip < 0 else own ^ (1 << flip)
            for k in range(starts[band], starts[band + 1]):
                if ids[k] >= before[i]:
                    break  # in ascending order within a band
                if looks[k] != 0 and _distance(wanted[i], looks[k]) <= MAX_DISTANCE:
                    found[i] = True
                    break
            if found[i]:
                break


@njit(nogil=True, cache=True)
def _distance(a: int, b: int) -> int:
    """Number of different bits of two uint64."""
    bits = a ^ b
    num = 0
    while bits and num <= MAX_DISTANCE:
        bits &= bits - np.uint64(1)
        num += 1
    return num
