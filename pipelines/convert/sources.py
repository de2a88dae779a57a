"""Where images come from: an image folder, an .npz of arrays, scikit-learn's digits."""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from pipelines.errors import DataError

SourceKind = Literal["folder", "npz", "digits"]
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
NUM_DIGITS_TEST = 500
MAX_LABEL = 999_999  # a classifier has one output for each number up to the largest label


@dataclass(frozen=True, kw_only=True)
class Source:
    """N images to convert.

    Attributes:
        name: For the sidecar and messages.
        images: N paths, or uint8 [N, H, W] or [N, H, W, 3].
        labels: int64 [N]; -1 = none.
        class_names: Names by label; None: unlabelled, or the names are unknown.
        num_ignored: Files that were left aside by their names (hidden, or without an image's extension).
    """

    name: str
    images: Sequence[str] | np.ndarray
    labels: np.ndarray
    class_names: list[str] | None = None
    num_ignored: int = 0


def build_source(kind: SourceKind, src: str | None, split: str | None) -> Source:
    """List the images of a source.

    Args:
        kind: "folder", "npz" or "digits".
        src: The folder or the .npz file; unused by "digits".
        split: "digits": train, test or None (all). "npz": a suffix, arrays `x_<split>`, `y_<split>`. Not for "folder".
    Raises:
        ValueError: unknown kind, missing `src`, or a split that the kind does not have.
        DataError: the source does not exist, is not of its kind, or holds no images.
    """
    if kind not in get_args(SourceKind):
        raise ValueError(f"source kind must be one of {', '.join(get_args(SourceKind))}, not {kind!r}")
    if kind == "digits":
        return digits_source(split)
    if src is None:
        raise ValueError(f"source kind {kind} needs a path")
    if kind == "npz":
        return npz_source(Path(src), split)
    if split is not None:
        raise ValueError("split: a folder has none; give the folder of the split itself")
    return folder_source(Path(src))


def folder_source(folder: Path) -> Source:
    """Images in class sub-folders (the names, sorted, are the classes), or straight in the folder (unlabelled)."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    flat, num_ignored = _split_by_name([entry.path for entry in os.scandir(folder) if entry.is_file()])
    images: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found, num_others = _split_by_name(_walk(folder / name))
        images += found
        labels += [label] * len(found)
        num_ignored += num_others
    if images and flat:
        raise DataError(f"{folder}: has images beside class sub-folders with images; move one or the other away")
    if not images and not flat:
        raise DataError(f"{folder}: no images in it (looked for {' '.join(sorted(EXTENSIONS))})")
    name = str(folder.resolve())
    if flat:
        return Source(name=name, images=flat, labels=np.full(len(flat), -1), num_ignored=num_ignored)
    return Source(name=name, images=images, labels=np.array(labels), class_names=classes, num_ignored=num_ignored)


def npz_source(path: Path, split: str | None = None) -> Source:
    """Arrays `x` uint8 [N, H, W] or [N, H, W, 3] and, if there, `y` int [N]; `x_<split>`, `y_<split>` of a split."""
    suffix = f"_{split}" if split else ""
    x_key, y_key = f"x{suffix}", f"y{suffix}"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if x_key not in arrays:
                raise DataError(f"{path}: no array {x_key} in it; it has: {', '.join(arrays) or 'nothing'}")
            x = arrays[x_key]
            y = arrays[y_key] if y_key in arrays else np.full(len(x), -1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except DataError:
        raise
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable .npz of plain arrays; write it with numpy.savez") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3) or not x.size:
        raise DataError(f"{path}: {x_key} must be uint8 [N, H, W] or [N, H, W, 3], not {x.dtype} {list(x.shape)}")
    if not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
        raise DataError(f"{path}: {y_key} must be integers [{len(x)}], not {y.dtype} {list(y.shape)}")
    if not -1 <= int(y.min()) <= int(y.max()) <= MAX_LABEL:
        raise DataError(f"{path}: {y_key} must be in -1..{MAX_LABEL}, not {y.min()}..{y.max()}")
    return Source(name=str(path.resolve()), images=x, labels=y.astype(np.int64))


def digits_source(split: str | None = None) -> Source:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, 16 levels scaled to 255; the label is the digit.

    The split is fixed: 1,297 train, 500 test, stratified. Each digit gives the test set its share of the 500, rounded
    by largest remainder; which images, a permutation by numpy's frozen generator RandomState(0) says. The order
    within a split is scikit-learn's.
    """
    from sklearn.datasets import load_digits  # a second to import

    if split not in (None, "train", "test"):
        raise ValueError(f"split: digits has train and test, not {split!r}")
    levels, digit = load_digits(return_X_y=True)
    chosen = np.ones(len(digit), bool)
    if split is not None:
        chosen = _stratified_test_mask(digit, NUM_DIGITS_TEST) == (split == "test")
    images = np.round(levels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[chosen]
    name = f"scikit-learn digits, {split or 'all'}"
    return Source(name=name, images=images, labels=digit[chosen], class_names=[str(k) for k in range(10)])


def _stratified_test_mask(labels: np.ndarray, num_test: int) -> np.ndarray:
    share = np.bincount(labels) * num_test / len(labels)
    num_per_class = share.astype(int)
    largest_first = np.argsort(num_per_class - share, kind="stable")
    num_per_class[largest_first[: num_test - num_per_class.sum()]] += 1
    order = np.random.RandomState(0).permutation(len(labels))
    mask = np.zeros(len(labels), bool)
    for label, num in enumerate(num_per_class):
        mask[order[labels[order] == label][:num]] = True
    return mask


def _walk(folder: Path) -> list[str]:
    return [os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]


def _split_by_name(paths: list[str]) -> tuple[list[str], int]:
    """Those that are named like images, sorted, and the number of the others."""
    images = [p for p in paths if Path(p).suffix.lower() in EXTENSIONS and not os.path.basename(p).startswith(".")]
    return sorted(images), len(paths) - len(images)
