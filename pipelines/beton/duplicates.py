"""Counts images that are copies of others, or that look almost like others, by their hashes."""

# N images of one file, Q images to look for

from itertools import combinations
from typing import Any

import numpy as np
from numba import njit

# Of the 64 bits of a look. Of CIFAR-10's 10,000 test images, 185 have a training image within this distance, 98 % of
# them one of their class. The number of different bits is even, since half of each look's bits are set.
MAX_DISTANCE = 6
NUM_KEYS = 1 << 16  # of two bytes
MAX_ALL_PAIRS = 4096  # of so few looks, all are compared
# Of more images, only copies are counted: the time to compare looks grows with the square.
MAX_SIMILAR_IMAGES = 3_000_000


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
    """For each wanted look, whether one of the looks with a smaller id than its `before` is within MAX_DISTANCE.

    Looks that differ in at most 6 bits share at least 2 of their 8 bytes: of many looks, only those that share a pair
    are compared.
    """
    wanted, looks = np.ascontiguousarray(wanted, np.uint64), np.ascontiguousarray(looks, np.uint64)
    found = wanted == 0  # those have no look
    pairs = list(combinations(range(0, 64, 8), 2)) if len(looks) > MAX_ALL_PAIRS else [None]
    for pair in pairs:
        key, wanted_key = _key_of(looks, pair), _key_of(wanted, pair)
        order, wanted_order = (np.argsort(each, kind="stable") for each in (key, wanted_key))
        starts = np.concatenate([[0], np.bincount(key, minlength=NUM_KEYS if pair else 1).cumsum()])
        _compare(wanted, wanted_key, wanted_order, before, looks[order], ids[order], starts, found)
    return found & (wanted != 0)


def _key_of(looks: np.ndarray, pair: tuple[int, int] | None) -> np.ndarray:
    """The two bytes at these bits, uint16; all the same without."""
    if pair is None:
        return np.zeros(len(looks), np.uint16)
    first, second = ((looks >> np.uint64(bit)).astype(np.uint8).astype(np.uint16) for bit in pair)
    return first << np.uint16(8) | second


@njit(nogil=True, cache=True)
def _compare(
    wanted: np.ndarray,
    wanted_key: np.ndarray,
    wanted_order: np.ndarray,
    before: np.ndarray,
    looks: np.ndarray,
    ids: np.ndarray,
    starts: np.ndarray,
    found: np.ndarray,
) -> None:
    """Compare each wanted look with the looks of its key, until one is near."""
    for i in wanted_order:
        if found[i]:
            continue
        for k in range(starts[wanted_key[i]], starts[wanted_key[i] + 1]):
            if ids[k] >= before[i]:
                break  # they ascend within a key
            if looks[k] != 0 and _distance(wanted[i], looks[k]) <= MAX_DISTANCE:  # pyright: ignore
                found[i] = True
                break


@njit(nogil=True, cache=True)
def _distance(a: np.uint64, b: np.uint64) -> np.uint64:
    """Number of different bits, added up in parallel in 2, 4 and 8 bits (Warren, Hacker's Delight, 5-1)."""
    bits = a ^ b
    bits -= (bits >> np.uint64(1)) & np.uint64(0x5555555555555555)
    bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)
