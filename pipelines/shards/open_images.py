"""Opens what a user names: a .beton file, a folder or manifest of many, a pattern, or a URL."""

import glob
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pipelines.beton import BetonReader
from pipelines.errors import DataError
from pipelines.remote.store import is_url
from pipelines.samples import Samples
from pipelines.shards.build import manifest_of
from pipelines.shards.manifest import MANIFEST_NAME
from pipelines.shards.mixed_images import MixedImages
from pipelines.shards.pieces import LocalFiles
from pipelines.shards.sharded_images import ShardedImages, open_sharded
from pipelines.shards.store import LocalStore

AnyImages: TypeAlias = BetonReader | ShardedImages | MixedImages


def open_images(
    place: str | Path, *, cache_dir: str | None = None, cache_bytes: int = 0
) -> BetonReader | ShardedImages:
    """Open a .beton file or a data set of many.

    Args:
        place: A .beton file; a folder with a manifest, the manifest, a pattern of the files of one folder such as
            "shards/*.beton", or the URL of a folder or manifest.
        cache_dir: See `open_sharded`.
        cache_bytes: See `open_sharded`.
    Raises:
        DataError: there is no such thing.
    """
    text = os.fspath(place)
    if is_url(text) or text.endswith(".json"):
        return open_sharded(text, cache_dir=cache_dir, cache_bytes=cache_bytes)
    path = Path(text)
    if path.is_dir():
        if not (path / MANIFEST_NAME).exists():
            raise DataError(
                f"{path}: a folder without {MANIFEST_NAME}: `fastssl manifest {path}` writes it for the .beton files "
                "in it, `fastssl convert` converts a folder of images"
            )
        return open_sharded(text)
    if glob.has_magic(text) and not path.exists():
        return _open_pattern(path)
    return BetonReader(path)


def names_dataset(place: str | Path) -> bool:
    """Whether a user means a data set of many: a URL, a manifest, a folder with one, or a pattern of .beton files."""
    text = os.fspath(place)
    if is_url(text) or text.endswith(".json"):
        return True
    path = Path(text)
    is_pattern = text.endswith(".beton") and glob.has_magic(text) and not path.exists()
    return is_pattern or (path / MANIFEST_NAME).is_file()


def some_labels(images: AnyImages, ids: np.ndarray) -> np.ndarray:
    """Labels of some samples, int64 [n], without those of all others."""
    if isinstance(images, ShardedImages):
        return images.few_rows(ids)["label"].astype(np.int64)
    return images.labels[ids]


def few_samples(images: AnyImages, ids: np.ndarray) -> Samples:
    """Some samples from places far apart, such as for a picture; see `ShardedImages.few`."""
    return images.few(ids) if isinstance(images, ShardedImages) else images.samples(ids)


def _open_pattern(pattern: Path) -> ShardedImages:
    """The files of a pattern as a data set; their rows files must be there, no manifest is needed."""
    folder = pattern.parent
    if glob.has_magic(str(folder)):
        raise DataError(f"{pattern}: a pattern stands for files of one folder: write * only after the last /")
    names = sorted(Path(name).name for name in glob.glob(str(pattern)))
    if not names:
        raise DataError(f"{pattern}: no file has such a name")
    manifest = manifest_of(LocalStore(folder), names)
    return ShardedImages(str(pattern), manifest, LocalFiles(folder, manifest))
