"""Seeded cases for tests with random input, and limits on their time and memory."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def cases(name: str, default: int) -> Iterator[np.random.Generator]:
    """A generator for each case; FUZZ_CASES overrides their number, and the seed of a case that fails is printed."""
    for number in range(int(os.environ.get("FUZZ_CASES", default))):
        seed = [*name.encode(), number]
        finished = False
        try:
            yield np.random.default_rng(seed)
            finished = True
        finally:
            if not finished:
                print(f"{name}: case {number} failed, numpy.random.default_rng({seed})")


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with a few of them changed, removed, repeated or moved."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, end = sorted(rng.integers(0, len(changed) + 1, 2).tolist())
        end = min(end, at + int(rng.integers(1, 40)))
        part = bytes(changed[at:end])
        changed[at:end] = [rng.bytes(len(part)), b"", part * 2, part[::-1]][rng.integers(4)]
    return bytes(changed)


@contextmanager
def limits(seconds: float, megabytes: int) -> Iterator[None]:
    """Raise TimeoutError after this time, and MemoryError where the block wants more memory than this in addition."""

    def expired(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
