"""What every source gives: its items by number, in a fixed order."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.errors import DataError

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_LABEL = 999_999  # a classifier has one output for each number up to the largest label


class Item(NamedTuple):
    """One image before its conversion.

    Attributes:
        name: For messages.
        image: The path of a file, a file's bytes, pixels uint8 [H, W] or [H, W, 3], or a decoded image.
        label: -1 = none.
    """

    name: str
    image: str | bytes | np.ndarray | Image.Image
    label: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to convert.

    The number is known before the first image is read: the file needs room for that many records, the progress bar
    an end, and shards equal ranges.

    Attributes:
        name: For the sidecar and messages.
        num_items: N, corrupt images included.
        read: (start, stop) -> items start..stop-1, read one after the other.
        fingerprint: Changes when the source does: its names, labels, sizes and dates.
        class_names: Names by label; None: unlabelled, or the names are unknown.
        num_ignored: Files that were left aside (hidden, or without an image's extension).
    """

    name: str
    num_items: int
    read: Callable[[int, int], Iterator[Item]]
    fingerprint: str
    class_names: list[str] | None = None
    num_ignored: int = 0


def fingerprint(paths: Iterable[str], more: bytes = b"") -> str:
    """SHA-256 over names, sizes and dates of files, and `more`; a file that is not there counts by its name."""
    digest = hashlib.sha256(more)
    for path in paths:
        try:
            stat = os.stat(path)
            facts = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except OSError:
            facts = f"{path}\n"
        digest.update(facts.encode(errors="surrogateescape"))
    return digest.hexdigest()


def is_image_name(path: str) -> bool:
    """Whether the name is that of an image: its extension is one of them, and it is not hidden."""
    return Path(path).suffix.lower() in EXTENSIONS and not os.path.basename(path).startswith(".")


def checked_label(label: object, where: str) -> int:
    """An integer label in -1..MAX_LABEL; None is -1.

    Raises:
        DataError: anything else; the message names `where`.
    """
    if label is None:
        return -1
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or not -1 <= label <= MAX_LABEL:
        raise DataError(f"{where}: the label must be an integer in -1..{MAX_LABEL}, not {str(label)[:40]!r}")
    return int(label)


def path_source(
    name: str, paths: list[str], labels: np.ndarray, class_names: list[str] | None = None, num_ignored: int = 0
) -> Source:
    """Image files, in the order given.

    Args:
        name: See `Source`.
        paths: N files.
        labels: int64 [N]; -1 = none.
        class_names: See `Source`.
        num_ignored: See `Source`.
    """

    def read(start: int, stop: int) -> Iterator[Item]:
        for i in range(start, stop):
            yield Item(paths[i], paths[i], int(labels[i]))

    return Source(
        name=name,
        num_items=len(paths),
        read=read,
        fingerprint=fingerprint(paths, labels.astype(np.int64).tobytes()),
        class_names=class_names,
        num_ignored=num_ignored,
    )


def array_source(
    name: str, pixels: np.ndarray, labels: np.ndarray, fingerprint: str, class_names: list[str] | None = None
) -> Source:
    """Images from one array, stored as raw pixels.

    Args:
        name: See `Source`.
        pixels: uint8 [N, H, W] or [N, H, W, 3].
        labels: int64 [N]; -1 = none.
        fingerprint: See `Source`.
        class_names: See `Source`.
    """

    def read(start: int, stop: int) -> Iterator[Item]:
        for i in range(start, stop):
            yield Item(f"{name}, image {i}", pixels[i], int(labels[i]))

    return Source(name=name, num_items=len(pixels), read=read, fingerprint=fingerprint, class_names=class_names)
