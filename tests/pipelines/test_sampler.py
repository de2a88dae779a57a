import numpy as np
import pytest

from pipelines.sampler import CHUNK_BYTES, epoch_order, global_batches, local_rows, quasi_random_windows, split_holdout


def test_epoch_order_golden() -> None:
    assert epoch_order(np.arange(12), seed=7, epoch=3).tolist() == [10, 3, 4, 2, 5, 11, 6, 1, 9, 7, 0, 8]


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    ids = np.arange(100, 1100)
    orders = [epoch_order(ids, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), ids)
    assert np.mean(orders[0] == orders[1]) < 0.01
    assert np.mean(orders[0] == orders[2]) < 0.01


def test_epoch_order_is_uniform() -> None:
    """Every sample is first about equally often: chi-square with 9 degrees of freedom, 99.9% point 27.9."""
    first = [epoch_order(np.arange(10), 0, epoch)[0] for epoch in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert np.sum((counts - 200) ** 2 / 200) < 27.9


def test_order_does_not_depend_on_how_the_ids_are_listed() -> None:
    ids = np.arange(500)
    np.testing.assert_array_equal(epoch_order(ids, 1, 2), epoch_order(ids[::-1], 1, 2))


def test_leaving_samples_out_keeps_the_order_of_the_others() -> None:
    ids = np.arange(500)
    order = epoch_order(ids, 1, 2)
    np.testing.assert_array_equal(epoch_order(ids[ids % 5 > 0], 1, 2), order[order % 5 > 0])


def test_global_batches_drop_the_rest() -> None:
    batches = global_batches(np.arange(103), 0, 4, global_batch_size=16)
    assert batches.shape == (6, 16)
    np.testing.assert_array_equal(batches.ravel(), epoch_order(np.arange(103), 0, 4)[:96])


@pytest.fixture
def layout() -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of 3,000 images of 20 to 200 kB, one after the other: 81 chunks."""
    num_bytes = np.random.default_rng(0).integers(20_000, 200_000, 3000).astype(np.uint64)
    return np.uint64(5000) + np.cumsum(num_bytes) - num_bytes, num_bytes


def test_quasi_random_windows_golden(layout) -> None:
    """Of the chunks: what changes them changes every run with that order."""
    windows = quasi_random_windows(*layout, seed=7, epoch=3, window_bytes=40_000_000)
    chunk_of = (layout[0] // np.uint64(CHUNK_BYTES)).astype(int)
    first = [int(windows[np.argmax(chunk_of == chunk)]) for chunk in range(12)]
    assert first == [4, 1, 0, 3, 4, 7, 6, 0, 7, 2, 4, 3]


def test_a_window_is_whole_chunks_from_all_over_the_file(layout) -> None:
    data_ptr, data_bytes = layout
    windows = quasi_random_windows(data_ptr, data_bytes, seed=0, epoch=0, window_bytes=40_000_000)
    chunk_of = (data_ptr // np.uint64(CHUNK_BYTES)).astype(int)
    num_chunks = chunk_of.max() + 1
    assert all(len(np.unique(windows[chunk_of == chunk])) == 1 for chunk in range(num_chunks))
    num_bytes = np.bincount(windows, weights=data_bytes)
    assert num_bytes.sum() == data_bytes.sum()
    assert np.all(num_bytes[:-1] > 40_000_000 - 2 * CHUNK_BYTES)
    assert np.all(num_bytes < 40_000_000 + 2 * CHUNK_BYTES)
    for window in range(len(num_bytes) - 1):
        chunks = np.unique(chunk_of[windows == window])
        assert chunks.min() < num_chunks / 2 < chunks.max()
        assert np.diff(chunks).max() > 1


def test_quasi_random_order_goes_window_by_window_and_mixes_each(layout) -> None:
    ids = np.arange(3000)
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        windows = quasi_random_windows(*layout, seed=seed, epoch=epoch, window_bytes=40_000_000)
        order = epoch_order(ids, seed, epoch, windows)
        np.testing.assert_array_equal(np.sort(order), ids)
        assert np.all(np.diff(windows[order]) >= 0)
        first = order[windows[order] == 0]
        np.testing.assert_array_equal(first, epoch_order(np.flatnonzero(windows == 0), seed, epoch))
        assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.2
        orders.append(order)
    assert np.mean(orders[0] == orders[1]) < 0.01
    assert np.mean(orders[0] == orders[2]) < 0.01


def test_one_window_is_the_random_order(layout) -> None:
    windows = quasi_random_windows(*layout, seed=2, epoch=1, window_bytes=1 << 40)
    ids = np.arange(3000)
    np.testing.assert_array_equal(global_batches(ids, 2, 1, 64, windows), global_batches(ids, 2, 1, 64))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_are_the_global_batches(world_size: int) -> None:
    batches = global_batches(np.arange(1000), 5, 1, global_batch_size=32)
    parts = [local_rows(batches, rank, world_size) for rank in range(world_size)]
    assert {part.shape for part in parts} == {(31, 32 // world_size)}
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), batches)


def test_bad_sizes() -> None:
    batches = global_batches(np.arange(64), 0, 0, 32)
    with pytest.raises(ValueError, match="not a multiple of the world size 3"):
        local_rows(batches, 0, 3)
    with pytest.raises(ValueError, match="rank"):
        local_rows(batches, 2, 2)
    for size in (0, 65):
        with pytest.raises(ValueError, match="global_batch_size"):
            global_batches(np.arange(64), 0, 0, size)


def test_holdout_is_stratified_disjoint_and_fixed() -> None:
    labels = np.repeat([0, 1, 2, -1], [1000, 500, 37, 13])
    fit, held_out = split_holdout(len(labels), 0.1, labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([fit, held_out])), np.arange(len(labels)))
    assert len(held_out) == 155
    counts = {label: int(np.sum(labels[held_out] == label)) for label in (0, 1, 2, -1)}
    assert counts == {0: 100, 1: 50, 2: 4, -1: 1}
    assert np.all(np.diff(held_out) > 0)
    np.testing.assert_array_equal(split_holdout(len(labels), 0.1, labels)[1], held_out)
    assert held_out[:5].tolist() == [15, 20, 28, 31, 38]


def test_holdout_of_many_small_classes_keeps_the_total() -> None:
    _, held_out = split_holdout(300, 0.1, np.repeat(np.arange(100), 3))
    assert len(held_out) == 30


def test_holdout_without_labels_spreads_over_the_file() -> None:
    fit, held_out = split_holdout(10_000, 0.2)
    assert (len(fit), len(held_out)) == (8000, 2000)
    assert 900 < np.sum(held_out < 5000) < 1100


def test_holdout_bounds() -> None:
    assert len(split_holdout(10, 0.0)[1]) == 0
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="fraction"):
            split_holdout(10, fraction)
    with pytest.raises(ValueError, match="labels"):
        split_holdout(10, 0.1, np.zeros(9))
