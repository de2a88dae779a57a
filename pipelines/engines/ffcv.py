"""The default engine: FFCV's Loader with one operation that decodes a sample once and crops all its views.

FFCV provides the prefetching thread and the output slots. Its generated code is not compiled: it runs once per batch,
and numba would recompile it, for 10 to 50 s, in every process.
"""

# B local batch, V views, Vg views of one output size S

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from queue import Empty, Full
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba.core import config as numba_config

from pipelines.bad_samples import BadSamples
from pipelines.batch import RawBatch
from pipelines.beton import BetonReader
from pipelines.beton.format import FIELD, HEADER, IMAGE_TYPE
from pipelines.engines import DrawBatch, Groups
from pipelines.engines.decode_crop import BatchDecoder, Decoding
from pipelines.errors import DataError


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """Restore torch's and numba's thread counts, which FFCV sets at import and whenever a Loader is built."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


@contextmanager
def _numba_off() -> Iterator[None]:
    """Disable numba during FFCV's import, which fills a numba dictionary of two entries that takes 4 s to compile."""
    was_disabled, numba_config.DISABLE_JIT = numba_config.DISABLE_JIT, True  # pyright: ignore
    try:
        yield
    finally:
        numba_config.DISABLE_JIT = was_disabled  # pyright: ignore[reportAttributeAccessIssue]


if find_spec("ffcv") is None:
    raise DataError("engine ffcv needs FFCV: pip install --no-deps ffcv==1.0.2; resident reads raw pixels without it")

with _thread_counts_kept(), _numba_off():
    from ffcv.loader import Loader
    from ffcv.loader import loader as ffcv_loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline import graph as ffcv_graph
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.types import ALLOC_TABLE_TYPE


def _allocate_slots(query: AllocationQuery, batch_size: int, num_slots: int) -> np.ndarray:
    """Allocate FFCV's output slots with numpy.

    FFCV allocates them with torch for every epoch. glibc does not reuse freed blocks of that kind, so the memory grows.
    With a GPU, FFCV also pins them, which is unnecessary, since the pixel op makes its own copy.
    """
    return np.empty((num_slots, batch_size, *query.shape), query.dtype)  # pyright: ignore (ours are numpy types)


ffcv_graph.allocate_query = _allocate_slots

# A thread with a finished batch checks at this interval whether the batch is still wanted.
_POLL_S = 0.05


class FfcvEngine:
    """FFCV's file access and prefetching with our draw, decoding and resampling."""

    def __init__(
        self, reader: BetonReader, *, num_workers: int, prefetch_batches: int, bad_samples: BadSamples
    ) -> None:
        """Build FFCV's Loader once, for all epochs.

        Args:
            reader: The open file.
            num_workers: Decoding threads, >= 1.
            prefetch_batches: Batches made ahead of the consumer, >= 1.
            bad_samples: Records samples that cannot be decoded.
        """
        self._decoder = BatchDecoder(reader, num_workers, bad_samples)
        self._operation = _DecodeViews(reader, self._decoder)
        self._loader = _build_loader(reader, self._operation, prefetch_batches)
        self._thread: _EpochThread | None = None

    def batches(
        self, sample_ids: np.ndarray, local_batch_size: int, draw_batch: DrawBatch, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        self._stop()
        if not len(sample_ids):
            return
        self._operation.epoch = _Epoch(draw_batch=draw_batch, groups=groups)
        self._loader.batch_size = local_batch_size
        self._loader.traversal_order.sample_ids = sample_ids
        thread = self._thread = iter(self._loader)
        try:
            yield from thread
        finally:
            thread.stop()
            if self._thread is thread:
                self._thread = None  # frees the output slots as well

    def close(self) -> None:
        """See `Engine.close`."""
        self._stop()
        self._decoder.close()

    def _stop(self) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """Parameters of one iteration."""

    draw_batch: DrawBatch
    groups: Groups


class _Started(NamedTuple):
    """A batch that FFCV's thread hands over while it is still being decoded, to continue with the next batch."""

    views: list[np.ndarray]
    params: np.ndarray
    sample_ids: np.ndarray
    all_labels: np.ndarray
    decoding: Decoding

    def finished(self) -> RawBatch:
        """Wait for the batch and return it; its sample ids are final only then."""
        self.decoding.wait()
        labels = self.all_labels[self.sample_ids]
        return RawBatch(views=self.views, params=self.params, labels=labels, sample_ids=self.sample_ids)


class _DecodeViews(Operation):
    """FFCV's decoder operation for all views of a sample."""

    def __init__(self, reader: BetonReader, decoder: BatchDecoder) -> None:
        super().__init__()
        self._reader = reader
        self._decoder = decoder
        self.epoch: _Epoch | None = None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        """One output per size, uint8 [Vg, S, S, 3] per sample; FFCV calls this for every epoch."""
        groups = self.epoch.groups if self.epoch else []
        shapes = [(len(members), size_px, size_px, 3) for size_px, members in groups]
        return replace(previous_state, jit_mode=True), tuple(AllocationQuery(s, np.dtype(np.uint8)) for s in shapes)

    def generate_code(self) -> Callable[..., "_Started"]:
        """The function that FFCV's thread calls for each batch."""
        return self._start

    def _start(self, sample_ids: np.ndarray, outputs: tuple[np.ndarray, ...], *_: Any) -> "_Started":
        assert self.epoch is not None
        reader = self._reader
        params = self.epoch.draw_batch(sample_ids, reader.sizes[sample_ids])
        sample_ids, boxes = sample_ids.astype(np.int64), params["crop_box"].copy()  # the decoder may write there
        decoding = self._decoder.start(reader.mmap, sample_ids, boxes, self.epoch.groups, outputs)
        return _Started(list(outputs), params, sample_ids, reader.labels, decoding)


class _GivenOrder(TraversalOrder):
    """The sampler's order. FFCV's Loader expects an instance and then calls it."""

    def __init__(self) -> None:
        self.sample_ids = np.empty(0, np.int64)

    def __call__(self, loader: Loader) -> "_GivenOrder":
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.sample_ids


class _MappedReader(Reader):
    """FFCV's reader of a file's structure, without an index in memory, since our own reader has one.

    Upstream copies the metadata and the allocation table, and its memory manager builds three dictionaries of Python
    objects over all samples, in every process.
    """

    def read_metadata(self) -> None:
        """Map the metadata into memory; only FFCV's own operations would read them."""
        start = HEADER.itemsize + self.field_descriptors.nbytes
        shape = (int(self.num_samples),)
        self.metadata = np.memmap(self.file_name, self.metadata_type, "r", offset=start, shape=shape)

    def read_allocation_table(self) -> None:
        """Skip the table: our operation uses the addresses and sizes of our reader."""
        self.alloc_table = np.empty(0, ALLOC_TABLE_TYPE)


class _Loader(Loader):
    """FFCV's Loader with an `__iter__` that does not set torch's thread count."""

    traversal_order: _GivenOrder

    def __iter__(self) -> "_EpochThread":
        return _EpochThread(self, self.next_traversal_order())


class _EpochThread(EpochIterator):
    """FFCV's prefetching thread, extended to pass on exceptions and to be stoppable.

    In upstream's `run`, an exception ends the thread while the consumer waits forever. It also cannot be stopped when
    the queue is full at the end, and it sets torch's thread count.
    """

    def run(self) -> None:
        try:
            for number, sample_ids in enumerate(self.iter_ixes):
                # Slots: one to be handed over, `batches_ahead` waiting and one used by the consumer.
                slot = number % (self.loader.batches_ahead + 2)
                (started,) = self.run_pipeline(number, sample_ids, slot, None)
                if not self._hand_over(started):
                    started.decoding.cancel()
                    return
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def __next__(self) -> RawBatch:
        item = self.output_queue.get()
        if item is None:
            raise StopIteration
        try:
            if isinstance(item, BaseException):
                raise item
            return item.finished()
        except BaseException as error:
            error.add_note(f"while making a batch from {self.loader.fname}")
            raise

    def stop(self) -> None:
        """Stop the thread and its tasks; waits for samples that are being decoded, not for whole batches."""
        self.terminate_event.set()
        self.join()
        self.close()
        with suppress(Empty):
            while True:
                item = self.output_queue.get_nowait()
                if isinstance(item, _Started):
                    item.decoding.cancel()
        # A consumer that still holds this iterator must not wait forever.
        self.output_queue.put(RuntimeError("this iteration was ended by another one, or by close()"))

    def _hand_over(self, item: object) -> bool:
        while not self.terminate_event.is_set():
            with suppress(Full):
                self.output_queue.put(item, timeout=_POLL_S)
                return True
        return False


def _build_loader(reader: BetonReader, operation: Operation, prefetch_batches: int) -> _Loader:
    """Build FFCV's Loader with `operation` on the image field, without compiling the generated code."""
    num_fields = int(reader.mmap[: HEADER.itemsize].view(HEADER)["num_fields"][0])
    fields = reader.mmap[HEADER.itemsize :][: num_fields * FIELD.itemsize].view(FIELD)
    pipelines: dict[str, PipelineSpec | None] = {}
    for field in fields:
        name = field["name"].tobytes().rstrip(b"\0").decode()
        # None disables a field: labels come from our reader.
        pipelines[name] = PipelineSpec(name, decoder=operation) if field["type_id"] == IMAGE_TYPE else None
    with _thread_counts_kept(), _uncompiled(), _without_index():
        return _Loader(
            str(reader.path),
            batch_size=1,
            num_workers=1,
            os_cache=True,
            indices=(),  # unused, since we provide the order
            order=_GivenOrder(),
            pipelines=pipelines,  # pyright: ignore[reportArgumentType] (its annotation is too narrow)
            drop_last=False,
            batches_ahead=prefetch_batches,
        )


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Keep FFCV from compiling, and from using its `state_type`.

    That property sets `mutable = False` on numba's shared type object uint8[::1], which all kernels compiled for that
    type use: their lookups then fail with a KeyError. The property is needed for compilation only.
    """
    was_enabled, state_type = getattr(Compiler, "is_enabled", True), OSCacheManager.state_type
    Compiler.set_enabled(False)
    OSCacheManager.state_type = None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        OSCacheManager.state_type = state_type  # pyright: ignore[reportAttributeAccessIssue]
        Compiler.set_enabled(was_enabled)


@contextmanager
def _without_index() -> Iterator[None]:
    """Replace FFCV's Reader class, which its Loader does not take as an argument, by `_MappedReader`."""
    ffcv_loader.Reader = _MappedReader  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        ffcv_loader.Reader = Reader
