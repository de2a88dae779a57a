"""The interface of all sources: items by index, in a fixed order."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.beton.format import MAX_LABEL
from pipelines.convert.remote_source import RemoteObject, SourcePath
from pipelines.errors import DataError

MAX_ITEMS = 100_000_000  # of one file; the writer keeps 32 bytes for each in memory


class Item(NamedTuple):
    """One image before its conversion.

    Attributes:
        name: The name used in messages.
        image: The path of a file, a file's bytes, pixels uint8 [H, W] or [H, W, 3], or a decoded image.
        label: -1 = none.
    """

    name: str
    image: str | bytes | np.ndarray | Image.Image
    label: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to convert.

    The number of items is known before the first image is read. It is needed to reserve space for the records, for the
    progress bar, and to divide the items into equal shards.

    Attributes:
        name: The name used in the sidecar and in messages.
        num_items: N, including corrupt images.
        read: (start, stop) -> items start..stop-1, read one after the other.
        pick: (numbers) -> the items with these numbers, in this order, each number taken when its item is wanted.
            A source that can only be read from start to end raises DataError.
        fingerprint: Changes if the source changes: its names, labels, sizes or dates.
        class_names: Names by label; None: unlabelled, or the names are unknown.
        notes: Lines to print, about how the source is read.
        left_out: (name, kind) of each file or folder that was left out.
        num_left_out: Number of what was left out, by kind; also of kinds that `left_out` does not list.
    """

    name: str
    num_items: int
    read: Callable[[int, int], Iterator[Item]]
    pick: Callable[[Iterator[int]], Iterator[Item]]
    fingerprint: str
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()
    left_out: Sequence[tuple[str, str]] = ()
    num_left_out: Counter[str] = field(default_factory=Counter)


def fingerprint(paths: Iterable[SourcePath], more: bytes = b"") -> str:
    """SHA-256 over the names, sizes and dates of files, and `more`; of a missing file, only the name is used.

    Remote objects have an ETag instead of a date.
    """
    digest = hashlib.sha256(more)
    for path in paths:
        if isinstance(path, RemoteObject):
            digest.update(f"{path.shown}\0{path.num_bytes}\0{path.etag}\n".encode(errors="surrogateescape"))
            continue
        try:
            stat = os.stat(path)
            facts = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except (OSError, ValueError):  # ValueError: a NUL in the name
            facts = f"{path}\n"
        digest.update(facts.encode(errors="surrogateescape"))
    return digest.hexdigest()


def checked_label(label: object, where: str) -> int:
    """Return the label as an integer in -1..MAX_LABEL; None becomes -1.

    Raises:
        DataError: any other value; the message contains `where`.
    """
    if label is None:
        return -1
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or not -1 <= label <= MAX_LABEL:
        raise DataError(f"{where}: the label must be an integer in -1..{MAX_LABEL}, not {str(label)[:40]!r}")
    return int(label)


def path_source(
    name: str,
    paths: list[str],
    labels: np.ndarray,
    class_names: list[str] | None = None,
    *,
    notes: tuple[str, ...] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> Source:
    """A source of image files, in the given order.

    Args:
        name: See `Source`.
        paths: N files.
        labels: int64 [N]; -1 = none.
        class_names: See `Source`.
        notes: See `Source`.
        left_out: See `Source`.
    Raises:
        DataError: too many classes.
    """
    if class_names is not None and len(class_names) > MAX_LABEL + 1:
        raise DataError(f"{name}: {len(class_names):,} classes; a file holds at most {MAX_LABEL + 1:,}")

    def pick(numbers: Iterable[int]) -> Iterator[Item]:
        for i in numbers:
            yield Item(paths[i], paths[i], int(labels[i]))

    return Source(
        name=name,
        num_items=len(paths),
        read=lambda start, stop: pick(range(start, stop)),
        pick=pick,
        fingerprint=fingerprint(paths, labels.astype(np.int64).tobytes()),
        class_names=class_names,
        notes=notes,
        left_out=left_out,
        num_left_out=Counter(kind for _, kind in left_out),
    )


def array_source(
    name: str, pixels: np.ndarray, labels: np.ndarray, fingerprint: str, class_names: list[str] | None = None
) -> Source:
    """A source of images from one array, stored as raw pixels.

    Args:
        name: See `Source`.
        pixels: uint8 [N, H, W] or [N, H, W, 3].
        labels: int64 [N]; -1 = none.
        fingerprint: See `Source`.
        class_names: See `Source`.
    """

    def pick(numbers: Iterable[int]) -> Iterator[Item]:
        for i in numbers:
            yield Item(f"{name}, image {i}", pixels[i], int(labels[i]))

    return Source(
        name=name,
        num_items=len(pixels),
        read=lambda start, stop: pick(range(start, stop)),
        pick=pick,
        fingerprint=fingerprint,
        class_names=class_names,
    )
