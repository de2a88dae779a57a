"""How a kernel sees other ranks: as more columns. Process groups are the caller's (`fastssl.collectives`)."""

# W ranks; V blocks of B rows on each

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """The ranks that share a global batch. Every rank calls the same methods in the same order, with equal shapes."""

    @property
    def size(self) -> int:
        """W."""
        ...

    def check_same_shape(self, z: Tensor) -> None:
        """Refuse a z whose shape is another one on another rank.

        Raises:
            ValueError: On every rank.
        """
        ...

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """x [V, B, ...] itself, then the blocks of the other ranks in rank order, in at most two pieces [Q, B, ...].

        The others are fetched while the consumer works on the first. No gradient.
        """
        ...

    def sum_(self, x: Tensor) -> Tensor:
        """x, replaced by its sum over ranks. No gradient."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over ranks, the gradient passed straight through to the local x."""
        ...


class _Alone:
    """One process."""

    size = 1

    def check_same_shape(self, z: Tensor) -> None:
        pass

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        yield x.detach()

    def sum_(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x


ALONE: Exchange = _Alone()
