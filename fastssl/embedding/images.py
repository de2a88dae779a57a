"""The images to embed: every source that `fastssl convert` reads, and .beton files, without a conversion."""

# N images, H and W the sides of an image in pixels

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import Image

from fastssl.errors import UserError
from pipelines.beton import RAW, BetonReader
from pipelines.beton.bus_error import report_bus_errors
from pipelines.convert.image_files import left_out_lines
from pipelines.convert.images import CorruptImageError, decode_as_engines_do, read_upright, upright_rgb
from pipelines.convert.infer_kind import infer_kind
from pipelines.convert.source import Item, Source, path_source
from pipelines.convert.sources import SourceKind, SourceOptions, build_source, folder_source
from pipelines.errors import DataError
from pipelines.remote.store import is_url
from pipelines.samples import Samples
from pipelines.shards.open_images import names_dataset
from pipelines.shards.open_images import open_images as open_any
from pipelines.shards.pieces import Piece
from pipelines.shards.sharded_images import ShardedImages, to_samples

_SAMPLES_TOGETHER = 1024  # of one file
_BLOCKS_TOGETHER = 8  # of about 4 MB
KINDS = ("beton", "shards", *get_args(SourceKind))


class Entry(NamedTuple):
    """One image that is not read yet.

    Attributes:
        path: The file, or a name such as "x.tar/0001" or "x.beton, image 3".
        label: -1 = none.
        read: Gives its pixels, uint8 RGB [H, W, 3], upright; raises CorruptImageError with the reason.
    """

    path: str
    label: int
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in a fixed order.

    Attributes:
        name: For messages.
        num_images: N, with those that cannot be read.
        entries: (start, stop) -> entries start..stop-1, one after the other.
        fingerprint: Changes with the images.
        class_names: Names by label; None: unknown.
        notes: Lines about what was left out.
        origin: Arguments of `open_images` that open them again, JSON values.
    """

    name: str
    num_images: int
    entries: Callable[[int, int], Iterator[Entry]]
    fingerprint: str
    class_names: list[str] | None = None
    notes: tuple[str, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)


def open_images(src: str, kind: str | None = None, options: Mapping[str, Any] | None = None) -> Images:
    """List or count the images of a source; paths in it are absolute.

    Args:
        src: A folder, a data set of many .beton files (its folder, manifest, pattern or URL), a .beton, .parquet, .tar,
            .npz or .csv file, a folder or a pattern of parquet or tar files, or what
            `pipelines.convert.sources.build_source` takes for the kind.
        kind: One of KINDS; None: by the name, and of a folder by the files in it.
        options: Fields of `pipelines.convert.sources.SourceOptions`.

    Raises:
        UserError: Unknown kind, or an option that the kind does not have.
        DataError: The source does not exist, is of another kind, or holds no images.
    """
    kind = kind or _kind_of(src)
    if kind not in KINDS:
        raise UserError(f"--from must be one of {', '.join(KINDS)}, not {kind!r:.100}")
    given = {name: value for name, value in (options or {}).items() if value is not None}
    src = src if kind in ("torchvision", "digits") or is_url(src) else os.path.abspath(src)
    origin = {"src": src, "kind": kind, "options": given}
    if kind in ("beton", "shards", "folder") and given:
        raise UserError(f"{', '.join(given)}: not an option of a source of kind {kind}")
    if kind == "beton":
        return _of_beton(BetonReader(src), origin)
    if kind == "shards":
        return _of_shards(src, origin)
    try:
        source = _folder(Path(src)) if kind == "folder" else build_source(kind, src, SourceOptions(**given))  # pyright: ignore[reportArgumentType] it is one of KINDS
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise UserError(str(error)) from None
    return _of_source(source, origin)


def _kind_of(src: str) -> str:
    if names_dataset(src):
        return "shards"
    return "beton" if src.lower().endswith(".beton") and os.path.isfile(src) else infer_kind(src)


def _folder(folder: Path) -> Source:
    """The image files below a folder, with the labels of `fastssl convert`, in the order of `fastssl.embed`."""
    source = folder_source(folder)
    items = sorted(source.read(0, source.num_items), key=lambda item: Path(item.name))
    kinds = Counter(kind for _, kind in source.left_out)
    return path_source(
        str(folder),
        [item.name for item in items],
        np.array([item.label for item in items]),
        source.class_names,
        notes=(*source.notes, *left_out_lines(str(folder), kinds)),
    )


def _of_source(source: Source, origin: Mapping[str, Any]) -> Images:
    def entries(start: int, stop: int) -> Iterator[Entry]:
        for item in source.read(start, stop):
            yield Entry(item.name, item.label, partial(_read_item, item))

    return Images(
        name=source.name,
        num_images=source.num_items,
        entries=entries,
        fingerprint=source.fingerprint,
        class_names=source.class_names,
        notes=source.notes,
        origin=origin,
    )


def _read_item(item: Item) -> np.ndarray:
    if isinstance(item.image, np.ndarray):
        return item.image if item.image.ndim == 3 else np.repeat(item.image[:, :, None], 3, axis=2)
    return upright_rgb(item.image) if isinstance(item.image, Image.Image) else read_upright(item.image)


def _of_beton(reader: BetonReader, origin: Mapping[str, Any]) -> Images:
    report_bus_errors(reader)

    def entries(start: int, stop: int) -> Iterator[Entry]:
        for first in range(start, stop, _SAMPLES_TOGETHER):
            reader.check_unchanged()
            samples = reader.samples(np.arange(first, min(first + _SAMPLES_TOGETHER, stop)))
            yield from _entries_of(reader.path, samples)
        reader.check_unchanged()

    return Images(
        name=str(reader.path),
        num_images=reader.num_samples,
        entries=entries,
        fingerprint=json.dumps(reader.identity),
        class_names=reader.class_names,
        origin=origin,
    )


def _of_shards(src: str, origin: Mapping[str, Any]) -> Images:
    images = open_any(src)
    if not isinstance(images, ShardedImages):
        raise UserError(f"{src}: one file, not a data set of many: leave --from out")

    def read(first: int, stop: int) -> list[Piece]:
        return images.read(first, min(first + images.block_samples, stop))

    def entries(start: int, stop: int) -> Iterator[Entry]:
        """Some blocks are fetched side by side."""
        size = images.block_samples
        for group in range(start, stop, size * _BLOCKS_TOGETHER):
            firsts = range(group, min(group + size * _BLOCKS_TOGETHER, stop), size)
            for i, pieces in images.files.map(lambda first: read(first, stop), firsts):
                images.check_unchanged()
                for piece in pieces:
                    samples = to_samples(np.arange(i, i + len(piece.rows)), piece.rows, piece.addresses, piece.owners)
                    yield from _entries_of(images.path, samples, piece.damaged)
                    i += len(piece.rows)

    return Images(
        name=str(images.path),
        num_images=images.num_samples,
        entries=entries,
        fingerprint=json.dumps(images.identity),
        class_names=images.class_names,
        origin={**origin, "src": images.path if images.is_remote else src},  # a URL without a password
    )


def _entries_of(place: str | Path, samples: Samples, damaged: Mapping[int, str] | None = None) -> Iterator[Entry]:
    """Entries of stored samples; `damaged`: reasons by position."""
    for k, (i, label) in enumerate(zip(samples.ids.tolist(), samples.labels.tolist(), strict=True)):
        yield Entry(f"{place}, image {i}", label, partial(_read_sample, samples, k, (damaged or {}).get(k)))


def _read_sample(samples: Samples, position: int, reason: str | None) -> np.ndarray:
    """Pixels of a stored image, decoded as the engines do; `reason`: why it is damaged."""
    if reason:
        raise CorruptImageError(reason)
    height_px, width_px = samples.sizes[position].tolist()
    stored = samples.image_bytes(position)
    if samples.modes[position] == RAW:
        return stored.reshape(height_px, width_px, 3)
    return decode_as_engines_do(stored, height_px, width_px)
