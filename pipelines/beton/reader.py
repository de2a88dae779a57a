"""Reads a .beton file without ffcv."""

import mmap
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.beton.format import HEADER, JPG, RAW, hashes_path, sidecar_path, summarise
from pipelines.beton.identity import Identity, identity_of
from pipelines.beton.sidecar import read_sidecar
from pipelines.beton.tables import BetonTables, truncated
from pipelines.errors import DataError
from pipelines.files import check_state, open_regular, opened_with, read_records, state_of
from pipelines.samples import Samples, decode_sample


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
            self.descriptor = opened_with(self, self.path)
            self._state = state_of(self.descriptor)
            if self._state[0] < HEADER.itemsize:
                raise DataError(f"{path}: not a .beton file (shorter than its header); convert the data again")
            self.file_map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        self.mmap = np.frombuffer(self.file_map, np.uint8)
        tables = BetonTables(self.path, len(self.mmap), self._read_table)
        self.num_samples = tables.num_samples
        self.sizes, self.labels, self.modes = tables.sizes, tables.labels, tables.modes
        self.data_ptr, self.data_bytes = tables.data_ptr, tables.data_bytes
        self.data_start, self.alloc_table_start = tables.data_start, tables.alloc_table_start
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

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """See `ImageSet.check_unchanged`."""
        check_state(self.path, self.descriptor, self._state)

    def read(self, dtype: np.dtype, start: int, num: int) -> np.ndarray:
        """Read `num` records from byte `start` on, not through the map: touched pages count as the process's memory.

        Raises:
            DataError: the file ends before.
        """
        records = read_records(self.descriptor, dtype, start, num)
        if records is None:
            raise truncated(self.path)
        return records

    def _read_table(self, dtype: np.dtype, start: int, num: int) -> np.ndarray:
        """As `read`, but header and fields through the map: what is read from byte 0 on, the system reads far ahead."""
        if start > HEADER.itemsize:
            return self.read(dtype, start, num)
        return self.mmap[start : start + num * dtype.itemsize].view(dtype)

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

    def _read_sidecar(self) -> None:
        path = sidecar_path(self.path)
        self.sidecar: dict[str, Any] = read_sidecar(path) if path.is_file() else {}
        if self.sidecar and self.sidecar["num_images"] != self.num_samples:
            found = f"{self.sidecar['num_images']} images, {self.path.name} {self.num_samples}"
            raise DataError(f"{path}: belongs to another file (it lists {found}); delete it or convert again")
        self.class_names: list[str] | None = self.sidecar.get("class_names")


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
