"""Describes a data set of many shards by its manifest, and the shortest name of one for what is written beside it."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.remote.store import is_url
from pipelines.shards.manifest import MANIFEST_NAME, Manifest


def describe(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says, as JSON values: num_shards, num_images, modes, num_labelled, num_classes, class_counts
    (with "unlabelled", where there are any), height_px and width_px (None: several sizes), file_bytes, image_bytes and
    digest.
    """
    num_raw = sum(shard.num_raw for shard in manifest.shards)
    names = manifest.class_names or []
    counts = {
        str(names[label]) if label < len(names) else str(label): num for label, num in enumerate(manifest.label_counts)
    }
    counts |= dict.fromkeys(names[len(manifest.label_counts) :], 0)
    num_labelled = sum(manifest.label_counts)
    if num_labelled < manifest.num_images:
        counts["unlabelled"] = manifest.num_images - num_labelled
    height_px, width_px = manifest.one_size_px or (None, None)
    return {
        "num_shards": len(manifest.shards),
        "num_images": manifest.num_images,
        "modes": {"jpg": manifest.num_images - num_raw, "raw": num_raw},
        "num_labelled": num_labelled,
        "num_classes": len(names) or sum(num > 0 for num in manifest.label_counts),
        "class_counts": counts,
        "height_px": height_px,
        "width_px": width_px,
        "file_bytes": manifest.num_bytes,
        "image_bytes": manifest.image_bytes,
        "digest": manifest.digest,
    }


def short_name(place: str) -> str:
    """The name of a .beton file, of a data set's folder, or of the last folder or the host of a URL."""
    if is_url(place):
        parts = urlsplit(place)
        path = parts.path.rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
        return path.rpartition("/")[2] or parts.hostname or "images"
    path = Path(place).absolute()
    return path.name if _is_one(path) else _folder_of(path).name or "images"


def beside(place: str, ending: str) -> Path:
    """Where to write something about a file or data set: next to it, or for a URL in the current folder."""
    if is_url(place):
        return Path(short_name(place) + ending)
    path = Path(place)
    if _is_one(path):
        return path.with_name(path.name + ending)
    return _folder_of(path.absolute()).parent / f"{short_name(place)}{ending}"


def _is_one(path: Path) -> bool:
    """Whether it is one .beton file, and neither a folder, a manifest nor a pattern."""
    return path.is_file() and path.suffix != ".json"


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
