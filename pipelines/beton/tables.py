"""The tables of a .beton file, from wherever its bytes are: a memory map, or ranges of an object store."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pipelines.beton.format import (
    ALLOCATION,
    FFCV_VERSION,
    FIELD,
    FIELD_DTYPES,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    MAX_FIELDS,
    MAX_LABEL,
    RAW,
)
from pipelines.errors import DataError

BLOCK_SAMPLES = 1 << 16  # the index is read in blocks of this many samples


class BetonTables:
    """What a .beton file says of its samples, checked against each other and the file's size.

    Attributes:
        path: The file, or its URL.
        num_samples: N.
        sizes: int32 [N, 2], (height, width) in pixels.
        labels: int64 [N], in -1..MAX_LABEL; -1 = no label.
        modes: uint8 [N], `JPG` or `RAW`.
        data_ptr: uint64 [N], offset of each image's bytes in the file.
        data_bytes: uint64 [N], number of bytes of each image.
        data_start: Offset of the first byte after the metadata.
        alloc_table_start: Offset of the allocation table, which ends the file.
    """

    def __init__(self, path: str | Path, num_bytes: int, read: Callable[[np.dtype, int, int], np.ndarray]) -> None:
        """Read and check the tables.

        Args:
            path: See above; for messages.
            num_bytes: Its size.
            read: Called with a dtype, a byte offset and a number of records; returns the records, or raises DataError
                if the file ends before.
        Raises:
            DataError: not a .beton file, truncated, no samples, or labels out of range.
        """
        self.path, self._num_bytes, self._read = path, num_bytes, read
        if num_bytes < HEADER.itemsize:
            raise DataError(f"{path}: not a .beton file (shorter than its header); convert the data again")
        header = read(HEADER, 0, 1)[0]
        self.num_samples = int(header["num_samples"])
        self._read_metadata(header)
        self.alloc_table_start = int(header["alloc_table_ptr"])
        self._read_allocations(self.alloc_table_start)

    def _read_metadata(self, header: np.void) -> None:
        num_fields = int(header["num_fields"])
        if header["version"] != FFCV_VERSION or not 1 <= num_fields <= MAX_FIELDS:
            raise DataError(f"{self.path}: not a .beton file of format version {FFCV_VERSION}; convert the data again")
        start = HEADER.itemsize + num_fields * FIELD.itemsize
        if start > self._num_bytes:
            raise truncated(self.path)
        fields = self._read(FIELD, HEADER.itemsize, num_fields)
        types = fields["type_id"].tolist()
        if types.count(IMAGE_TYPE) != 1 or not set(types) <= set(FIELD_DTYPES):
            raise DataError(
                f"{self.path}: needs one RGB image field, and int or float fields only next to it; field types: {types}"
            )
        names = [self._field_name(name.tobytes()) for name in fields["name"]]
        if len(set(names)) < num_fields:
            raise DataError(f"{self.path}: two fields have one name: {names}; copy it or convert again")
        if self.num_samples == 0:
            raise DataError(f"{self.path}: holds no images; convert the data again")
        record = np.dtype([(f"f{k}", FIELD_DTYPES[t]) for k, t in enumerate(types)], align=True)
        self.data_start = start + self.num_samples * record.itemsize
        if self.data_start > self._num_bytes:
            raise truncated(self.path)
        self._read_records(record, start, image=f"f{types.index(IMAGE_TYPE)}")
        self.labels = np.full(self.num_samples, -1)
        if INT_TYPE in types:
            label = f"f{types.index(INT_TYPE)}"
            for rows, block in self._blocks(record, start):
                self.labels[rows] = self._checked_labels(block[label], rows.start)

    def _field_name(self, stored: bytes) -> str:
        """A field's name: ASCII, as FFCV requires, filled up with zeros."""
        name = stored.rstrip(b"\0")
        if not name.isascii() or not name.decode("ascii").isprintable() or not name:
            raise DataError(f"{self.path}: a field has the name {name!r}: damaged; copy it again or convert again")
        return name.decode("ascii")

    def _checked_labels(self, labels: np.ndarray, first: int) -> np.ndarray:
        bad = np.flatnonzero((labels < -1) | (labels > MAX_LABEL))
        if len(bad):
            raise DataError(
                f"{self.path}: image {first + bad[0]} has label {labels[bad[0]]}; labels are 0..{MAX_LABEL}, or -1 for "
                "none: copy it again or convert the data again"
            )
        return labels

    def _read_records(self, record: np.dtype, start: int, image: str) -> None:
        self.sizes = np.empty((self.num_samples, 2), np.int32)
        self.modes = np.empty(self.num_samples, np.uint8)
        self.data_ptr = np.empty(self.num_samples, np.uint64)
        for rows, block in self._blocks(record, start):
            self.sizes[rows, 0], self.sizes[rows, 1] = block[image]["height"], block[image]["width"]
            self.modes[rows], self.data_ptr[rows] = block[image]["mode"], block[image]["data_ptr"]

    def _read_allocations(self, start: int) -> None:
        num_bytes = self._num_bytes - start
        if not start or num_bytes < self.num_samples * ALLOCATION.itemsize or num_bytes % ALLOCATION.itemsize:
            raise truncated(self.path)
        self.data_bytes = np.empty(self.num_samples, np.uint64)
        in_order = True  # true for our writer's table; FFCV writes one worker's entries after another's
        for rows, block in self._blocks(ALLOCATION, start):
            self.data_bytes[rows] = block["size"]
            in_order = in_order and self._are_entries_of(rows, block)
        if not in_order:
            self._sort_allocations(start)
        for rows in self._slices():
            if self._is_damaged(rows):
                raise truncated(self.path)

    def _sort_allocations(self, start: int) -> None:
        table = self._read(ALLOCATION, start, (self._num_bytes - start) // ALLOCATION.itemsize)
        table = table[np.argsort(table["sample_id"], kind="stable")][: self.num_samples]
        if not self._are_entries_of(slice(0, self.num_samples), table):
            raise truncated(self.path)
        self.data_bytes = table["size"].copy()

    def _are_entries_of(self, rows: slice, entries: np.ndarray) -> bool:
        """Whether these are the entries of these samples, one each, for the places that their records name."""
        is_in_order = np.array_equal(entries["sample_id"], np.arange(rows.start, rows.stop))
        return is_in_order and np.array_equal(entries["ptr"], self.data_ptr[rows])

    def _is_damaged(self, rows: slice) -> bool:
        start, num_bytes = self.data_ptr[rows], self.data_bytes[rows]
        end = np.uint64(self.alloc_table_start)
        outside = (start < self.data_start) | (start > end) | (num_bytes > end - start)
        raw_bytes = self.sizes[rows].prod(axis=1, dtype=np.uint64) * np.uint64(3)
        modes = self.modes[rows]
        damaged = (modes == RAW) & (num_bytes != raw_bytes) | (modes > RAW) | (raw_bytes == 0)
        return bool(outside.any() or damaged.any())

    def _slices(self) -> Iterator[slice]:
        for first in range(0, self.num_samples, BLOCK_SAMPLES):
            yield slice(first, min(first + BLOCK_SAMPLES, self.num_samples))

    def _blocks(self, dtype: np.dtype, start: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Read the records of all samples, starting at byte `start`, in blocks.

        Reading all records at once is avoided, since freed memory of large arrays is not always returned to the system.
        """
        for rows in self._slices():
            yield rows, self._read(dtype, start + rows.start * dtype.itemsize, rows.stop - rows.start)


def truncated(path: str | Path) -> DataError:
    """The error for a file that ends too early, or whose tables contradict each other."""
    return DataError(f"{path}: truncated or damaged; copy it again or convert the data again")
