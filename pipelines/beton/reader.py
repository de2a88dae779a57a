"""Reads a .beton file without ffcv."""

import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.beton.format import (
    ALLOCATION,
    FFCV_VERSION,
    FIELD,
    FIELD_DTYPES,
    HEADER,
    IMAGE_TYPE,
    INT_TYPE,
    JPG,
    MAX_FIELDS,
    MAX_LABEL,
    RAW,
    hashes_path,
    sidecar_path,
    summarise,
)
from pipelines.beton.identity import Identity, identity_of
from pipelines.beton.sidecar import read_sidecar
from pipelines.errors import DataChangedError, DataError
from pipelines.files import open_regular
from pipelines.samples import Samples, decode_sample

BLOCK_SAMPLES = 1 << 16  # the index is read in blocks of this many samples


class BetonReader:
    """Random access to a .beton file through a memory map; never imports ffcv.

    The file is opened once: a file that is removed, or replaced by another of its name, is read to the end.

    Attributes:
        path: The file.
        descriptor: The open file, for reading at offsets (os.pread); closed with the reader.
        num_samples: N.
        sizes: int32 [N, 2], (height, width) in pixels.
        labels: int64 [N], in -1..MAX_LABEL; -1 = no label.
        modes: uint8 [N], `JPG` or `RAW`.
        data_ptr: uint64 [N], offset of each image's bytes in the file.
        data_bytes: uint64 [N], number of bytes of each image.
        mmap: uint8, the whole file.
        data_start: Offset of the first byte after the metadata.
        alloc_table_start: Offset of the allocation table, which ends the file.
        file_map: The memory map that `mmap` is a view of.
        sidecar: Contents of `<path>.json`; empty if there is no sidecar.
        class_names: Names by label, from the sidecar; None if unknown.
    """

    def __init__(self, path: str | Path) -> None:
        """Map the file and check its structure (not the images' contents).

        Raises:
            DataError: no such file, not a .beton file, truncated, no samples, labels out of range, or a sidecar of
                another file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such file; `fastssl convert` writes a .beton")
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self.descriptor)
            self._state = self._state_now()
            if self._state[0] < HEADER.itemsize:
                raise DataError(f"{path}: not a .beton file (shorter than its header); convert the data again")
            self.file_map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self.mmap = np.frombuffer(self.file_map, np.uint8)
        header = self.mmap[: HEADER.itemsize].view(HEADER)[0]
        self.num_samples = int(header["num_samples"])
        self._read_metadata(header)
        self.alloc_table_start = int(header["alloc_table_ptr"])
        self._read_allocations(self.alloc_table_start)
        self._read_sidecar()

    @property
    def identity(self) -> Identity:
        """See `identity_of`; computed once."""
        return self._identity_once

    @cached_property
    def _identity_once(self) -> Identity:
        return identity_of(self)

    @cached_property
    def hashes(self) -> np.ndarray | None:
        """uint64 [N, 2] from `<path>.hashes`, see `pipelines.convert.hashes.Hashes`; None: no readable file of them."""
        try:
            with open_regular(hashes_path(self.path)) as file:
                stored = file.read(self.num_samples * 16 + 1)
        except OSError:
            return None
        if len(stored) != self.num_samples * 16 or zlib.crc32(stored) != self.sidecar.get("hashes_crc32"):
            return None  # of another file of the same name
        return np.frombuffer(stored, "<u8").reshape(-1, 2)

    def check_unchanged(self) -> None:
        """Compare size and modification time with those at opening; takes about a microsecond.

        Raises:
            DataChangedError: the file was changed in place.
        """
        now = self._state_now()
        if now != self._state:
            what = "was written to" if now[0] == self._state[0] else f"went from {self._state[0]} to {now[0]} bytes"
            raise DataChangedError(
                f"{self.path}: {what} while in use: restore it, then start again (run.resume=auto resumes a training)"
            )

    def read(self, dtype: np.dtype, start: int, num: int) -> np.ndarray:
        """Read `num` records from byte `start` on, not through the map: touched pages count as the process's memory.

        Raises:
            DataError: the file ends before.
        """
        records = np.empty(num, dtype)
        left = records.view(np.uint8).data
        while left:
            num_read = os.preadv(self.descriptor, [left], start)
            if not num_read:
                raise self._truncated()
            left, start = left[num_read:], start + num_read
        return records

    def image_bytes(self, i: int) -> np.ndarray:
        """Stored bytes of sample i, a uint8 view of the memory map: a JPEG file, or H*W*3 raw pixels."""
        start = int(self.data_ptr[i])
        return self.mmap[start : start + int(self.data_bytes[i])]

    def samples(self, ids: np.ndarray) -> Samples:
        """See `ImageSet.samples`; the bytes are those of the memory map."""
        return Samples(
            ids=ids,
            addresses=self.data_ptr[ids] + np.uint64(self.mmap.ctypes.data),
            num_bytes=self.data_bytes[ids].astype(np.int64),
            modes=self.modes[ids],
            sizes=self.sizes[ids],
            labels=self.labels[ids],
            owners=(self.mmap,),
        )

    @property
    def stored_modes(self) -> tuple[int, ...]:
        """The modes that occur, ascending."""
        return tuple(mode for mode in (JPG, RAW) if (self.modes == mode).any())

    def decode(self, i: int) -> np.ndarray:
        """See `samples.decode_sample`."""
        return decode_sample(self.path, self.samples(np.array([i])), 0)

    def _read_metadata(self, header: np.void) -> None:
        num_fields = int(header["num_fields"])
        if header["version"] != FFCV_VERSION or not 1 <= num_fields <= MAX_FIELDS:
            raise DataError(f"{self.path}: not a .beton file of format version {FFCV_VERSION}; convert the data again")
        start = HEADER.itemsize + num_fields * FIELD.itemsize
        if start > len(self.mmap):
            raise self._truncated()
        fields = self.mmap[HEADER.itemsize : start].view(FIELD)
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
        if self.data_start > len(self.mmap):
            raise self._truncated()
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
        num_bytes = len(self.mmap) - start
        if not start or num_bytes < self.num_samples * ALLOCATION.itemsize or num_bytes % ALLOCATION.itemsize:
            raise self._truncated()
        self.data_bytes = np.empty(self.num_samples, np.uint64)
        in_order = True  # true for our writer's table; FFCV writes one worker's entries after another's
        for rows, block in self._blocks(ALLOCATION, start):
            self.data_bytes[rows] = block["size"]
            in_order = in_order and self._are_entries_of(rows, block)
        if not in_order:
            self._sort_allocations(start)
        for rows in self._slices():
            if self._is_damaged(rows):
                raise self._truncated()

    def _sort_allocations(self, start: int) -> None:
        table = self.read(ALLOCATION, start, (len(self.mmap) - start) // ALLOCATION.itemsize)
        table = table[np.argsort(table["sample_id"], kind="stable")][: self.num_samples]
        if not self._are_entries_of(slice(0, self.num_samples), table):
            raise self._truncated()
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
            yield rows, self.read(dtype, start + rows.start * dtype.itemsize, rows.stop - rows.start)

    def _state_now(self) -> tuple[int, int]:
        """Size in bytes and time of the last modification in ns. (Removing or renaming a file changes neither.)"""
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def _read_sidecar(self) -> None:
        path = sidecar_path(self.path)
        self.sidecar: dict[str, Any] = read_sidecar(path) if path.is_file() else {}
        if self.sidecar and self.sidecar["num_images"] != self.num_samples:
            found = f"{self.sidecar['num_images']} images, {self.path.name} {self.num_samples}"
            raise DataError(f"{path}: belongs to another file (it lists {found}); delete it or convert again")
        self.class_names: list[str] | None = self.sidecar.get("class_names")

    def _truncated(self) -> DataError:
        return DataError(f"{self.path}: truncated or damaged; copy it again or convert the data again")


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe the contents of a .beton file, as JSON values.

    Returns:
        The sidecar's entries, if there is one, and, read from the file itself: path, file_bytes, image_bytes (the
        sum over the images), num_images, height_px and width_px (min, median, max), modes and class_counts.
    Raises:
        DataError: see `BetonReader`.
    """
    reader = BetonReader(path)
    counted = summarise(reader.sizes, reader.modes, reader.labels, reader.class_names)
    num_bytes = {"file_bytes": len(reader.mmap), "image_bytes": int(reader.data_bytes.sum())}
    return reader.sidecar | {"path": str(path)} | num_bytes | counted
