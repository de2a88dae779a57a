"""What fuzz tests share: numbered cases with their own random generator, mutations, limits of time and memory.

`FUZZ_CASES=10000` sets the number of cases of a file, `FUZZ_SEED=17` runs one case of each test alone; a failing case
prints that number.
"""

import json
import os
import resource
import signal
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

QUICK_CASES = 100
RAN: Counter[tuple[str, str]] = Counter()  # cases by file and name that ended as they may, for the last lines
ODD_VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf")),
    *("", "x" * 300, "\0", "../x", [], {}, [[]]),
)


class LimitExceeded(BaseException):
    """A case took too long; no `except Exception` may hide it."""


@dataclass(frozen=True)
class Case:
    """One case of a fuzz test.

    Attributes:
        name: Of the test.
        seed: Number of the case.
        rng: Its random generator.
    """

    name: str
    seed: int
    rng: np.random.Generator

    @contextmanager
    def guarded(self, *, seconds: float = 20.0, memory_mb: int = 1024) -> Iterator[None]:
        """Limit time and additional address space, and print the seed of what fails."""
        try:
            with limits(seconds=seconds, memory_mb=memory_mb):
                yield
        except BaseException:
            print(f"failed: {self.name}: FUZZ_SEED={self.seed} runs this case alone")
            raise
        RAN[os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0], self.name] += 1


@contextmanager
def limits(*, seconds: float, memory_mb: int) -> Iterator[None]:
    """Limit the time and the additional address space of the block."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes() + (memory_mb << 20), before[1]))
    handler = signal.signal(signal.SIGALRM, _raise_limit)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest-timeout uses it too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def cases(name: str, *, fraction: float) -> Iterator[Case]:
    """The cases of a test, the same ones every time: this fraction of those of its file."""
    only = os.environ.get("FUZZ_SEED")
    for seed in [int(only)] if only else range(round(fraction * num_cases())):
        yield Case(name, seed, np.random.default_rng([zlib.crc32(name.encode()), seed]))


def num_cases() -> int:
    """Number of cases of a file of tests."""
    return int(os.environ.get("FUZZ_CASES", QUICK_CASES))


def address_space_bytes() -> int:
    """Virtual memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if data else 0):
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a piece by zeros, ones or noise."""
    start, length = _piece(data, rng)
    fill = (bytes(length), b"\xff" * length, rng.bytes(length))[int(rng.integers(3))]
    return data[:start] + fill + data[start + length :]


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off the end."""
    return data[: int(rng.integers(len(data) + 1))]


def remove(data: bytes, rng: np.random.Generator) -> bytes:
    """Take a piece out."""
    start, length = _piece(data, rng)
    return data[:start] + data[start + length :]


def repeat(data: bytes, rng: np.random.Generator) -> bytes:
    """Insert a piece a second time."""
    start, length = _piece(data, rng)
    return data[: start + length] + data[start:]


def replace_all(data: bytes, rng: np.random.Generator) -> bytes:
    """Other content altogether: nothing, noise, text, JSON that is nested deeply, a number of many digits."""
    others = (
        *(b"", rng.bytes(100), b"\0" * 4096, b"text\n" * 20),
        *(b"[" * 100_000, b"9" * 5000, b'{"a":' * 50_000, b"null"),
    )
    return others[int(rng.integers(len(others)))]


BYTE_MUTATIONS = (flip_bits, flip_bits, flip_bits, overwrite, cut, remove, repeat, replace_all)


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """One of the mutations above."""
    return BYTE_MUTATIONS[int(rng.integers(len(BYTE_MUTATIONS)))](data, rng)


def mutate_file(path: Path, rng: np.random.Generator) -> None:
    """Mutate a file's bytes, or delete it, or put a folder in its place."""
    action = int(rng.integers(12))
    if action < 10:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return
    path.unlink()
    if action == 11:
        path.mkdir()


def mutate_tree(tree: Any, rng: np.random.Generator, odd_values: tuple[Any, ...] = ODD_VALUES) -> Any:
    """A copy of nested dictionaries and lists in which one random node is deleted or replaced by an odd value."""
    nodes = list(_nodes(tree))
    target = nodes[int(rng.integers(len(nodes)))]
    new = _DELETE if rng.integers(4) == 0 else odd_values[int(rng.integers(len(odd_values)))]
    changed = _rebuilt(tree, (), target, new)
    return None if changed is _DELETE else changed


_DELETE = object()


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _nodes(value, (*path, key))


def _rebuilt(tree: Any, path: tuple[Any, ...], target: tuple[Any, ...], new: Any) -> Any:
    if path == target:
        return new
    if isinstance(tree, dict):
        rebuilt = {key: _rebuilt(value, (*path, key), target, new) for key, value in tree.items()}
        return {key: value for key, value in rebuilt.items() if value is not _DELETE}
    if isinstance(tree, list):
        listed = [_rebuilt(value, (*path, index), target, new) for index, value in enumerate(tree)]
        return [value for value in listed if value is not _DELETE]
    return tree


def mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Change one node of a JSON text."""
    return json.dumps(mutate_tree(json.loads(data), rng)).encode()


def _piece(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(data) + 1))
    return start, min(int(rng.integers(1, 200)), len(data) - start)


def _raise_limit(*_: object) -> None:
    raise LimitExceeded
