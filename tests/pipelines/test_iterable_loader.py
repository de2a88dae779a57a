"""Anybody's batches as a training takes them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pipelines.batch import Batch
from pipelines.errors import DataError
from pipelines.iterable_loader import IterableLoader

CPU = torch.device("cpu")
NUM_IMAGES, BATCH = 12, 4


@pytest.fixture
def views() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(NUM_IMAGES, 3, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture
def data_loader(views) -> DataLoader:
    return DataLoader(TensorDataset(*views), batch_size=BATCH)


def test_batches_of_a_data_loader(views, data_loader) -> None:
    loader = IterableLoader(data_loader, device=CPU, world_size=2)
    assert len(loader) == 3
    assert (loader.num_samples, loader.local_batch_size, loader.bad_sample_ids) == (2 * NUM_IMAGES, BATCH, ())
    assert loader.view_shapes == [(3, 8, 8), (3, 8, 8)]
    assert loader.identity == [3, BATCH]
    batches = list(loader.epoch(0))
    for view, expected in enumerate(views):
        assert torch.equal(torch.cat([batch.views[view] for batch in batches]), expected)
    assert batches[0].views[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(NUM_IMAGES))
    assert {label for batch in batches for label in batch.labels.tolist()} == {-1}


def test_an_epoch_goes_on_in_its_middle(data_loader) -> None:
    loader = IterableLoader(data_loader, device=CPU)
    whole, rest = list(loader.epoch(0)), list(loader.epoch(0, first_batch=1))
    assert len(rest) == 2
    assert all(torch.equal(a.views[1], b.views[1]) for a, b in zip(whole[1:], rest, strict=True))
    assert rest[0].sample_ids.tolist() == list(range(BATCH, 2 * BATCH))


def test_labels_of_a_pair_are_left_out(views) -> None:
    items = [((views[0][:BATCH], views[1][:BATCH]), torch.zeros(BATCH))]
    (batch,) = IterableLoader(items, device=CPU).epoch(0)
    assert torch.equal(batch.views[1], views[1][:BATCH])
    assert batch.labels.tolist() == [-1] * BATCH


def test_batches_of_our_own_keep_labels_and_ids(views) -> None:
    ids = torch.tensor([5, 6, 7, 8])
    item = Batch(views=[view[:BATCH] for view in views], labels=ids % 2, sample_ids=ids)
    (batch,) = IterableLoader([item], device=CPU).epoch(0)
    assert batch.sample_ids.tolist() == ids.tolist()
    assert batch.labels.tolist() == [1, 0, 1, 0]


def test_the_epoch_is_told_to_the_sampler(views) -> None:
    class Sampler:
        epochs: tuple[int, ...] = ()

        def set_epoch(self, epoch: int) -> None:
            self.epochs += (epoch,)

    class Items(list):
        sampler = Sampler()

    items = Items([[view[:BATCH] for view in views]])
    items.batch_sampler = SimpleNamespace(sampler=Sampler())
    loader = IterableLoader(items, device=CPU)
    for epoch in (3, 4):
        list(loader.epoch(epoch))
    assert items.sampler.epochs == items.batch_sampler.sampler.epochs == (3, 4)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(4, 3, 8, 8), r"got a tensor \[4, 3, 8, 8\] of float32"),
        ([torch.zeros(4, 3, 8, 8)], "at least two views"),
        ([np.zeros((4, 3, 8, 8)), np.zeros((4, 3, 8, 8))], "got a list of ndarray, ndarray"),
        ([torch.zeros(4, 8, 8, 3, dtype=torch.uint8)] * 2, "of uint8"),
        ({"a": 1}, "got dict"),
        ([], "got a list of nothing"),
    ],
)
def test_an_invalid_batch_is_described(item, message) -> None:
    with pytest.raises(DataError, match=message):
        IterableLoader([item], device=CPU)


def test_nothing_and_a_short_last_batch_are_refused(views) -> None:
    with pytest.raises(DataError, match="it gives no batch"):
        IterableLoader([], device=CPU)
    with pytest.raises(DataError, match="it has no length"):
        IterableLoader(iter([views]), device=CPU)  # pyright: ignore
    short = DataLoader(TensorDataset(*views), batch_size=5)
    loader = IterableLoader(short, device=CPU)
    with pytest.raises(DataError, match=r"batch 2 has views \[2, 3, 8, 8\].*the first one has 5 images"):
        list(loader.epoch(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_batch_waits_for_what_the_gpu_does(views) -> None:
    """Views that are not pinned are copied, too, while the step before runs."""
    views = [view.repeat(1, 1, 64, 64) for view in views]
    loader = IterableLoader(DataLoader(TensorDataset(*views), batch_size=BATCH), device=torch.device("cuda"))
    batches = loader.epoch(0)
    next(batches)  # memory is allocated
    step_done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    step_done.record()
    batch = next(batches)
    assert not step_done.query()
    for view, expected in zip(batch.views, views, strict=True):
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view.cpu(), expected[BATCH : 2 * BATCH])
    assert batch.labels.tolist() == [-1] * BATCH
    assert batch.sample_ids.tolist() == list(range(BATCH, 2 * BATCH))
