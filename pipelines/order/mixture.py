"""Which of several sources the samples of a mixture come from: exact by position."""

# n positions, S sources, P positions of a period

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm

import numpy as np

MAX_PERIOD = 1 << 16


class Mixture:
    """A periodic pattern of sources with exact counts, spread evenly.

    In every prefix of the pattern, each source has its exact share within one sample.

    Attributes:
        counts: Positions of each source in a period: int64 [S]. The weights as smallest integers (0.7, 0.2 and 0.1 are
            7, 2 and 1) if their sum is at most 65,536; otherwise shares of 65,536 by largest remainder.
        period: Their sum, P.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        """Compute the pattern.

        Args:
            weights: S positive numbers, S >= 1; decimal numbers are taken as they are written.
        Raises:
            ValueError: no weights, one that is not positive and finite, or one too small for any position.
        """
        if not len(weights):
            raise ValueError("a mixture needs at least one weight")
        for weight in weights:
            if not (isfinite(weight) and weight > 0):
                raise ValueError(f"weights must be positive numbers, got {weight}")
        # str: Fraction(0.1) is the binary number, 3602879701896397 / 2**55.
        exact = [Fraction(weight) if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
        self.counts = _integers(exact)
        self.period = int(self.counts.sum())
        if not self.counts.all():
            least = min(exact) / sum(exact)
            raise ValueError(f"a weight is {float(least):.1e} of the sum; it must be at least 1/{MAX_PERIOD}")
        self._sources = _spread(self.counts)
        # Counts before a position of the period are below 2**16.
        self._num_before = np.zeros((self.period, len(self.counts)), np.uint16)
        for source in range(len(self.counts)):
            np.cumsum(self._sources[:-1] == source, out=self._num_before[1:, source])

    def source_of(self, positions: np.ndarray | int) -> np.ndarray:
        """Return the source of each position.

        Args:
            positions: Non-negative integers [n].
        Returns:
            int64 [n], each in [0, S).
        Raises:
            ValueError: a negative position.
        """
        return self._sources[_checked(positions) % self.period].astype(np.int64)

    def num_before(self, positions: np.ndarray | int) -> np.ndarray:
        """Return how many earlier positions have each source: for a position's own source its number in the source.

        Args:
            positions: Non-negative integers [n].
        Returns:
            int64 [n, S]; the sum of a row is the position.
        Raises:
            ValueError: a negative position.
        """
        period, slot = np.divmod(_checked(positions), self.period)
        return period[..., None] * self.counts + self._num_before[slot]


def _checked(positions: np.ndarray | int) -> np.ndarray:
    positions = np.asarray(positions, np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions must be >= 0, got {positions.min()}")
    return positions


def _integers(weights: Sequence[Fraction]) -> np.ndarray:
    """Weights as smallest integers, or as shares of `MAX_PERIOD`: int64 [S]."""
    scale = lcm(*(weight.denominator for weight in weights))
    integers = [int(weight * scale) for weight in weights]
    divisor = gcd(*integers)
    if sum(integers) // divisor <= MAX_PERIOD:
        return np.array([number // divisor for number in integers])
    exact = [Fraction(number * MAX_PERIOD, sum(integers)) for number in integers]
    shares = [int(share) for share in exact]
    largest_first = sorted(range(len(exact)), key=lambda k: (shares[k] - exact[k], k))
    for k in largest_first[: MAX_PERIOD - sum(shares)]:
        shares[k] += 1
    return np.array(shares)


def _spread(counts: np.ndarray) -> np.ndarray:
    """The source of each position of a period, int64 [P].

    The k-th sample of a source, from 0, may lie at positions floor(k * P / count) up to ceil((k + 1) * P / count) - 1,
    which keeps every prefix within one sample of the exact share. The earliest end goes first, which always succeeds:
    Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", Algorithmica 15 (1996).
    """
    period = int(counts.sum())
    first, end, source = [], [], []
    for k, count in enumerate(counts):
        number = np.arange(count)
        first.append(number * period // count)
        end.append(-(-(number + 1) * period // count))
        source.append(np.full(count, k))
    first, end, source = np.concatenate(first), np.concatenate(end), np.concatenate(source)
    by_first = np.argsort(first, kind="stable")
    starts, entries = (
        first[by_first].tolist(),
        list(zip(end[by_first].tolist(), source[by_first].tolist(), strict=True)),
    )
    pattern, waiting, num_started = np.empty(period, np.int64), [], 0
    for position in range(period):
        while num_started < period and starts[num_started] <= position:
            heapq.heappush(waiting, entries[num_started])
            num_started += 1
        pattern[position] = heapq.heappop(waiting)[1]
    return pattern
