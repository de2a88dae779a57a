"""The .beton file format (FFCV version 2) as data types, and its sidecar file.

Layout, all little-endian: header | field descriptors | metadata, one record per sample | data region, in pages |
allocation table (offset and size of each sample's bytes), to the end of the file.
Source: ffcv 1.0.2, types.py, writer.py and memory_allocator.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.samples import JPG, RAW  # the values of `mode`

SIDECAR_VERSION = 1

FFCV_VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
METADATA = np.dtype([("f0", IMAGE), ("f1", "<i8")], align=True)

FLOAT_TYPE, INT_TYPE, IMAGE_TYPE = 0, 1, 2
FIELD_DTYPES = {FLOAT_TYPE: np.dtype("<f8"), INT_TYPE: np.dtype("<i8"), IMAGE_TYPE: IMAGE}

PAGE_BYTES = 8 << 20  # FFCV's default
MAX_SIDE_PX = 65_535  # width and height are uint16
MAX_LABEL = 999_999  # a classifier has one output for each integer up to the largest label
MAX_FIELDS = 64  # a larger number means that this is another kind of file


def sidecar_path(path: Path) -> Path:
    """`x.beton` -> `x.beton.json`."""
    return path.with_name(f"{path.name}.json")


def hashes_path(path: Path) -> Path:
    """`x.beton` -> `x.beton.hashes`: uint64 [N, 2], little-endian; see `pipelines.convert.hashes.Hashes`."""
    return path.with_name(f"{path.name}.hashes")


def partial_path(path: Path) -> Path:
    """`x.beton` -> `x.beton.partial`, the file while it is written."""
    return path.with_name(f"{path.name}.partial")


def checkpoint_path(path: Path) -> Path:
    """`x.beton` -> `x.beton.partial.npz`, from which a killed writer's work is resumed."""
    return path.with_name(f"{path.name}.partial.npz")


def summarise(
    sizes: np.ndarray, modes: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None
) -> dict[str, Any]:
    """Compute counts and sizes of N samples, as JSON values.

    Args:
        sizes: int [N, 2], (height, width) in pixels.
        modes: uint8 [N], `JPG` or `RAW`.
        labels: int64 [N]; -1 = none.
        class_names: Names by label; None: the labels' digits.
    Returns:
        num_images, height_px and width_px (min, median, max), modes (number of images by mode), class_counts (number of
        images by class name; images without a label count as "unlabelled").
    """
    names = dict(enumerate(class_names or []))
    found, num = np.unique(labels, return_counts=True)
    counts = dict.fromkeys(names, 0) | dict(zip(found.tolist(), num.tolist(), strict=True))
    return {
        "num_images": len(sizes),
        "height_px": _spread(sizes[:, 0]),
        "width_px": _spread(sizes[:, 1]),
        "modes": {"jpg": int((modes == JPG).sum()), "raw": int((modes == RAW).sum())},
        "class_counts": {names.get(k, "unlabelled" if k == -1 else str(k)): n for k, n in counts.items()},
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
