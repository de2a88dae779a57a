import time
import tracemalloc

import numpy as np
import pytest

from pipelines.order import keyed
from pipelines.order.keyed import MAX_NUM, SMALL, position_of, sample_at, small_orders

NUMS = [1, 2, 3, 5, 64, 1000, SMALL - 1, SMALL, SMALL + 1, 100_003, (1 << 17) - 1, 1 << 17, 300_000]


@pytest.mark.parametrize("num", NUMS)
@pytest.mark.parametrize("address", [(0, 0, 0), ((1 << 64) - 1, (1 << 32) - 1, (1 << 32) - 1)])
def test_an_order_is_a_bijection_and_has_its_inverse(num, address) -> None:
    positions = np.arange(num)
    samples = sample_at(positions, num, *address)
    assert samples.dtype == np.int64
    np.testing.assert_array_equal(np.sort(samples), positions)
    np.testing.assert_array_equal(position_of(samples, num, *address), positions)


def test_every_small_number_of_samples() -> None:
    for num in range(1, 200):
        np.testing.assert_array_equal(np.sort(sample_at(np.arange(num), num, 3, 1)), np.arange(num))


@pytest.mark.parametrize("num", [(1 << 32) - 5, 1 << 32, (1 << 33) + 1, 10**15, (1 << 61) + 1, MAX_NUM])
def test_inverse_of_large_orders(num) -> None:
    positions = np.concatenate([np.arange(2000), num - 1 - np.arange(2000), np.arange(2000) * (num // 2000)])
    samples = sample_at(positions, num, 5, 2)
    assert samples.min() >= 0
    assert samples.max() < num
    assert len(np.unique(samples)) == len(np.unique(positions))
    np.testing.assert_array_equal(position_of(samples, num, 5, 2), positions)
    assert abs(samples.mean() / num - 0.5) < 0.02  # deviation 0.0037


def test_golden() -> None:
    """What changes these numbers changes every run with these orders."""
    positions = np.arange(8)
    assert sample_at(positions, 8, 7, 3).tolist() == [7, 1, 5, 3, 4, 6, 2, 0]
    assert sample_at(positions, 1000, 7, 3, 2).tolist() == [819, 634, 354, 343, 137, 31, 215, 681]
    assert sample_at(positions, 100_000, 7, 3).tolist() == [5964, 96891, 12192, 29269, 41305, 66717, 49288, 63426]
    assert sample_at(positions, 10**9, 7, 3, 2).tolist() == [
        68121323,
        30578000,
        389891784,
        263430553,
        342486001,
        523110141,
        484983210,
        635432181,
    ]
    assert sample_at(positions[:4], MAX_NUM, (1 << 64) - 7, 3, 2).tolist() == [
        1792440089436408770,
        568003967262865941,
        3930605950267211441,
        4385394533562755132,
    ]


def pair_excess(samples: np.ndarray, num: int) -> float:
    """Chi-square of adjacent samples in 16 x 16 cells against uniform, in standard deviations (of 255 degrees)."""
    cells = samples * 16 // num
    found = np.bincount(cells[:-1] * 16 + cells[1:], minlength=256)
    edges = np.bincount(np.arange(num) * 16 // num, minlength=16) / num  # a cell's share of the samples
    expected = np.outer(edges, edges).reshape(-1) * (len(samples) - 1)
    return float((((found - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


@pytest.mark.parametrize("num", [20_000, SMALL - 1, SMALL, 100_003, 1 << 20])
def test_adjacent_pairs_are_uniform(num) -> None:
    for seed in range(2):
        assert abs(pair_excess(sample_at(np.arange(num), num, seed, 0), num)) < 4
    assert pair_excess(np.arange(num), num) > 1000


def test_adjacent_pairs_of_a_huge_order_are_uniform() -> None:
    assert abs(pair_excess_of_range(10**15)) < 4


def pair_excess_of_range(num: int) -> float:
    samples = sample_at(np.arange(200_000) + num // 3, num, 0, 0)
    return (
        pair_excess(samples >> 20, num >> 20) if num < 1 << 36 else pair_excess((samples / num * 160).astype(int), 160)
    )


def xor_excess(num_bits: int, seeds: range) -> float:
    """Chi-square of the XOR of adjacent samples, in standard deviations of the sum over seeds."""
    num, total = 1 << num_bits, 0.0
    for seed in seeds:
        samples = sample_at(np.arange(num), num, seed, 0)
        found = np.bincount((samples[1:] ^ samples[:-1]) >> 2, minlength=num // 4)
        expected = (num - 1) / (num // 4)
        total += ((found - expected) ** 2 / expected).sum() - (num // 4 - 1)
    return total / np.sqrt(2 * (num // 4 - 1) * len(seeds))


def test_differences_are_uniform() -> None:
    assert abs(xor_excess(18, range(4))) < 3.5


def test_too_few_rounds_would_be_seen(monkeypatch) -> None:
    """The tests above can fail: a network of three rounds is told from a random order by both statistics."""
    monkeypatch.setattr(keyed, "NUM_ROUNDS", 3)
    assert xor_excess(18, range(1)) > 20
    assert pair_excess(sample_at(np.arange(1 << 17), 1 << 17, 0, 0), 1 << 17) > 20


@pytest.mark.slow
def test_four_rounds_are_too_few(monkeypatch) -> None:
    assert abs(xor_excess(20, range(4))) < 3.5
    monkeypatch.setattr(keyed, "NUM_ROUNDS", 4)
    assert xor_excess(20, range(4)) > 6


@pytest.mark.parametrize("num", [1000, 100_000])
def test_orders_differ_by_seed_epoch_and_stream(num) -> None:
    positions = np.arange(num)
    orders = [
        sample_at(positions, num, *address) for address in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))
    ]
    orders.append(sample_at(positions, num, 1 << 32, 0))  # the seed's high word
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(order == other) < 0.01
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.15


def test_the_first_sample_is_uniform() -> None:
    """Chi-square with 9 degrees of freedom, 99.9% point 27.9."""
    for num in (10, SMALL + 4464):
        first = [int(sample_at(0, num, 0, epoch)) * 10 // num for epoch in range(2000)]
        assert np.sum((np.bincount(first, minlength=10) - 200) ** 2 / 200) < 27.9


def test_all_permutations_of_four_occur_equally_often() -> None:
    """Chi-square with 23 degrees of freedom, 99.9% point 49.7."""
    orders = small_orders(4, 0, 0, np.arange(2400))
    found = np.unique(orders @ np.array([64, 16, 4, 1]), return_counts=True)[1]
    assert len(found) == 24
    assert np.sum((found - 100) ** 2 / 100) < 49.7


def test_shapes_and_streams() -> None:
    num = 100_000
    positions = np.arange(12).reshape(3, 4)
    samples = sample_at(positions, num, 0, 0, np.array([[1], [2], [3]]))
    for row, stream in enumerate((1, 2, 3)):
        np.testing.assert_array_equal(samples[row], sample_at(positions[row], num, 0, 0, stream))
    np.testing.assert_array_equal(position_of(samples, num, 0, 0, np.array([[1], [2], [3]])), positions)
    assert sample_at(5, num, 0, 0).shape == ()
    assert sample_at(5, 9, 0, 0).shape == ()
    assert sample_at(np.empty(0, int), num, 0, 0).shape == (0,)
    rows = small_orders(50, 4, 1, np.array([0, 7]))
    np.testing.assert_array_equal(rows[1], sample_at(np.arange(50), 50, 4, 1, 7))


def test_a_callers_array_is_not_changed() -> None:
    for num in (8, 100_000):
        positions = np.arange(8)
        sample_at(positions, num, 0, 0)[:] = 0
        assert positions.tolist() == list(range(8))
        assert len(np.unique(sample_at(positions, num, 0, 0))) == 8


def test_a_position_needs_neither_time_nor_memory_for_the_order() -> None:
    sample_at(0, 10**9, 0, 0)
    tracemalloc.start()
    start_s = time.perf_counter()
    sample_at(np.arange(1000), MAX_NUM, 0, 1)
    wall_s, (_, peak) = time.perf_counter() - start_s, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert wall_s < 0.1
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 0), "num must be in 1"),
        ((0, MAX_NUM + 1, 0, 0), "num must be in 1"),
        ((8, 8, 0, 0), r"positions must be in \[0, 8\)"),
        ((-1, 100_000, 0, 0), r"positions must be in \[0, 100000\)"),
        ((0, 8, -1, 0), "seed"),
        ((0, 8, 1 << 64, 0), "seed"),
        ((0, 100_000, 0, 1 << 32), "epoch"),
        ((0, 100_000, 0, 0, 1 << 32), "stream"),
        ((0, 100_000, 0, 0, -1), "stream"),
        ((0, 8, 0, 0, np.array([1, 2])), "stream must be one number"),
    ],
)
def test_bad_numbers(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        sample_at(*arguments)
