"""Interface of kernels to other ranks, whose rows are additional columns. Process groups: `fastssl.collectives`."""

# W ranks; V blocks of B rows on each

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Exchange(Protocol):
    """Communication of the ranks of a global batch. All ranks must make the same calls, in order, with equal shapes."""

    @property
    def size(self) -> int:
        """W."""
        ...

    def check_same_shape(self, z: Tensor) -> None:
        """Check that z has the same shape on all ranks.

        Raises:
            ValueError: On every rank, if the shapes differ.
        """
        ...

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield x [V, B, ...] itself, then the other ranks' blocks in rank order, in at most two pieces [Q, B, ...].

        The other blocks are fetched while the consumer works on the first. No gradient.
        """
        ...

    def sum_(self, x: Tensor) -> Tensor:
        """Replace x in place by its sum over ranks and return it. No gradient."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """Mean of x over ranks, with the gradient passed straight through to the local x."""
        ...


class _Alone:
    """The exchange of a single process."""

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
