from fractions import Fraction

import numpy as np
import pytest

from pipelines.order.mixture import MAX_PERIOD, Mixture

WEIGHTS = [
    [1],
    [3.5],
    [1, 1],
    [0.7, 0.2, 0.1],
    [5, 3, 2, 1, 1, 1],
    [1, 1000],
    [1 / 3, 2 / 3],
    [0.123456, 0.3, 0.576544],
    [Fraction(1, 3), Fraction(1, 6), Fraction(1, 2)],
    list(range(1, 40)),
    [2.0**0.5, 3.0**0.5, 5.0**0.5, 0.01],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_is_within_one_sample_of_the_exact_share(weights) -> None:
    mixture = Mixture(weights)
    period = mixture.period
    sources = mixture.source_of(np.arange(2 * period))
    assert sources.dtype == np.int64
    np.testing.assert_array_equal(np.bincount(sources[:period], minlength=len(weights)), mixture.counts)
    np.testing.assert_array_equal(sources[:period], sources[period:])
    num_before = np.zeros((period + 1, len(weights)), np.int64)
    for source in range(len(weights)):
        num_before[1:, source] = np.cumsum(sources[:period] == source)
    # In integers: |found - n * count / P| < 1.
    exact = np.arange(period + 1)[:, None] * mixture.counts
    assert np.abs(num_before * period - exact).max() < period
    np.testing.assert_array_equal(mixture.num_before(np.arange(period)), num_before[:-1])


def test_golden() -> None:
    """What changes the pattern changes every run with a mixture."""
    assert "".join(map(str, Mixture([0.7, 0.2, 0.1]).source_of(np.arange(10)))) == "0001001002"
    assert "".join(map(str, Mixture([3, 2]).source_of(np.arange(10)))) == "0100101001"


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.7, 0.2, 0.1], [7, 2, 1]),
        ([7, 2, 1], [7, 2, 1]),
        ([14, 4, 2], [7, 2, 1]),
        ([1e-3, 1], [1, 1000]),
        ([0.5, 0.25], [2, 1]),
        ([1, MAX_PERIOD - 1], [1, MAX_PERIOD - 1]),
        ([Fraction(1, 3), 1], [1, 3]),
        ([0.3333333, 0.6666667], [21845, 43691]),  # shares 21845.33 and 43690.67
        ([1, 40_000, 40_000], [1, 32_768, 32_767]),  # shares 0.82, and 32,767.59 twice: the first one is rounded up
    ],
)
def test_counts(weights, counts) -> None:
    mixture = Mixture(weights)
    assert mixture.counts.tolist() == counts
    assert mixture.period == sum(counts)


def test_far_positions() -> None:
    mixture = Mixture([0.7, 0.2, 0.1])
    positions = np.array([[0, 9], [10, 10**15 + 3]])
    near = np.array([[0, 9], [0, 3]])
    np.testing.assert_array_equal(mixture.source_of(positions), mixture.source_of(near))
    before = mixture.num_before(positions)
    np.testing.assert_array_equal(before.sum(axis=-1), positions)
    np.testing.assert_array_equal(before[1, 1], mixture.num_before(3) + 10**14 * np.array([7, 2, 1]))


def test_numbers_in_a_source_are_consecutive() -> None:
    mixture = Mixture([5, 3, 2])
    positions = np.arange(100)
    sources = mixture.source_of(positions)
    numbers = np.take_along_axis(mixture.num_before(positions), sources[:, None], axis=1)[:, 0]
    for source, num in enumerate((50, 30, 20)):
        assert numbers[sources == source].tolist() == list(range(num))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "at least one weight"),
        ([1, 0], "positive numbers, got 0"),
        ([1, -2], "positive numbers, got -2"),
        ([float("nan")], "positive numbers, got nan"),
        ([1, float("inf")], "positive numbers, got inf"),
        ([1, 1e-9], "1.0e-09 of the sum; it must be at least 1/65536"),
    ],
)
def test_bad_weights(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(weights)


def test_negative_positions() -> None:
    for method in (Mixture([1]).source_of, Mixture([1]).num_before):
        with pytest.raises(ValueError, match="positions must be >= 0, got -1"):
            method(np.array([3, -1]))
