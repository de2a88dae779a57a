"""A source in a random order, so that every shard and every block of a shard has images of all classes."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pipelines.convert.source import Item, Source
from pipelines.order.keyed import sample_at

_NUM_AT_ONCE = 1 << 14  # positions; bounds the memory
_EPOCH = (1 << 32) - 1  # none of a training's, whose orders are independent of this one


def shuffled(source: Source, seed: int) -> Source:
    """Return the source with its items in a keyed random order; see `pipelines.order.keyed`.

    Args:
        source: Any source.
        seed: In [0, 2**64).
    """

    def numbers(start: int, stop: int) -> Iterator[int]:
        for first in range(start, stop, _NUM_AT_ONCE):
            positions = np.arange(first, min(first + _NUM_AT_ONCE, stop))
            yield from sample_at(positions, source.num_items, seed, _EPOCH).tolist()

    def read(start: int, stop: int) -> Iterator[Item]:
        return source.pick(numbers(start, stop))

    return replace(source, read=read)


def pick_from(sources: list[Source], numbers: Iterator[int]) -> Iterator[tuple[int, Item]]:
    """Yield the items with some numbers of several sources, numbered through, each with its source's position."""
    stops = np.cumsum([source.num_items for source in sources])
    wanted: list[deque[int]] = [deque() for _ in sources]
    # Each source reads from its own queue, which has one number whenever the source is asked for an item.
    items = [source.pick(iter(queue.popleft, None)) for source, queue in zip(sources, wanted, strict=True)]
    for number in numbers:
        k = int(np.searchsorted(stops, number, side="right"))
        wanted[k].append(number - int(stops[k]) + sources[k].num_items)
        yield k, next(items[k])
