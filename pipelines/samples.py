"""Stored images of a batch, described alike wherever they lie; and what the engines take as a data set."""

# n samples, N of the data set

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipelines.errors import DataError, one_line
from pipelines.jpeg_scans import MAX_SCANS, has_too_many_scans

JPG, RAW = 0, 1  # how an image is stored: as a JPEG file, or as its pixels


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Some samples of a data set, in the order of their use, with the places of their bytes in memory.

    Attributes:
        ids: int64 [n].
        addresses: Where the bytes of each image begin in this process's memory, uint64 [n].
        num_bytes: Number of its bytes, int64 [n].
        modes: `JPG` or `RAW`, uint8 [n].
        sizes: Height and width in pixels, int32 [n, 2].
        labels: int64 [n]; -1 = no label.
        owners: What keeps the memory valid: the addresses may be used while this object exists.
    """

    ids: np.ndarray
    addresses: np.ndarray
    num_bytes: np.ndarray
    modes: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    owners: tuple[object, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | np.ndarray) -> Samples:
        """The samples at these positions."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _ARRAYS})

    def copy(self) -> Samples:
        """The same samples in arrays of their own, which `put` may change."""
        return replace(self, **{name: getattr(self, name).copy() for name in _ARRAYS})

    def put(self, position: int, other: Samples) -> None:
        """Put the only sample of `other` in the place of another; its `owners` must be kept by the caller."""
        for name in _ARRAYS:
            getattr(self, name)[position] = getattr(other, name)[0]

    def with_rows(self, rows: np.ndarray, others: Samples) -> Samples:
        """These samples with `others` at the positions `rows`."""
        changed = replace(self.copy(), owners=(*self.owners, *others.owners))
        for name in _ARRAYS:
            getattr(changed, name)[rows] = getattr(others, name)
        return changed

    def image_bytes(self, position: int) -> np.ndarray:
        """Stored bytes of one image, uint8: a JPEG file, or H*W*3 raw pixels. A view, which keeps `owners` alive."""
        return np.asarray(_Memory(int(self.addresses[position]), int(self.num_bytes[position]), self.owners))


_ARRAYS = ("ids", "addresses", "num_bytes", "modes", "sizes", "labels")


def joined(parts: Sequence[tuple[np.ndarray, Samples]]) -> Samples:
    """Samples from several parts, each with its positions in the result; together they have every position once."""
    order = np.argsort(np.concatenate([positions for positions, _ in parts]))
    arrays = {name: np.concatenate([getattr(part, name) for _, part in parts])[order] for name in _ARRAYS}
    return Samples(**arrays, owners=tuple(owner for _, part in parts for owner in part.owners))


class ImageSet(Protocol):
    """What loaders and engines take: a .beton file (`beton.BetonReader`), or many as one."""

    @property
    def path(self) -> Path | str: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def identity(self) -> list[int]:
        """Numbers that tell it from another data set of its name."""
        ...

    @property
    def stored_modes(self) -> tuple[int, ...]:
        """The modes that occur, ascending."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], (height, width) in pixels; of a large data set for evaluation only."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], -1 = no label; of a large data set for evaluation only."""
        ...

    def samples(self, ids: np.ndarray) -> Samples:
        """The samples with these ids, int64 [n], with their bytes.

        Raises:
            DataError: they cannot be read.
        """
        ...

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """Raise DataChangedError if its files have changed since they were opened; about a microsecond a file.

        Args:
            ids: Only files that hold these samples are looked at, int64 [n]; None: all that are open.
        """
        ...


class _Memory:
    """A piece of memory for numpy's array interface; an array of it keeps this object, hence the owners, alive."""

    def __init__(self, address: int, num_bytes: int, owners: tuple[object, ...]) -> None:
        self.owners = owners
        self.__array_interface__: dict[str, Any] = {
            "data": (address, True),  # read-only
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def decode_sample(path: Path | str, samples: Samples, position: int) -> np.ndarray:
    """Pixels of one sample, uint8 RGB [H, W, 3], decoded by Pillow if it is stored as JPEG.

    Args:
        path: The data set, for the message.
        samples: Some samples of it.
        position: Which of them.
    Raises:
        DataError: the bytes are not an image of the recorded size.
    """
    i, stored = samples.ids[position], samples.image_bytes(position)
    height_px, width_px = samples.sizes[position].tolist()
    try:
        pixels = stored.reshape(height_px, width_px, 3) if samples.modes[position] == RAW else _decode_jpeg(stored)
    except Exception as error:  # Pillow raises many types of exceptions
        raise DataError(f"{path}: image {i} cannot be decoded ({one_line(error)}); convert again") from error
    if pixels.shape[:2] != (height_px, width_px):
        found = f"{pixels.shape[0]}x{pixels.shape[1]}"
        raise DataError(f"{path}: image {i} is {found}, not {height_px}x{width_px} as recorded; convert again")
    return pixels


def _decode_jpeg(stored: np.ndarray) -> np.ndarray:
    content = stored.tobytes()
    if has_too_many_scans(content):
        raise ValueError(f"more than {MAX_SCANS} scans")
    return np.asarray(Image.open(io.BytesIO(content), formats=("JPEG",)).convert("RGB"))
