"""Sources of images: one function for each kind of source."""

import csv
import io
import os
import re
from dataclasses import dataclass, fields
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from pipelines.convert.image_files import ImageFiles
from pipelines.convert.source import (
    EXTENSIONS,
    Source,
    array_source,
    checked_label,
    fingerprint,
    path_source,
)
from pipelines.errors import DataError
from pipelines.files import open_regular, read_file

SourceKind = Literal["folder", "csv", "webdataset", "parquet", "torchvision", "npz", "digits"]
NUM_DIGITS_TEST = 500
MAX_BRACE_NUMBERS = 1_000_000
MAX_CLASS_LIST_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options that only some kinds of source support; None or False: not given.

    Attributes:
        classes: folder: a file with the names of the sub-folders to read, one a line; None: all.
        split: digits: train, test or None (all). npz: a suffix, arrays `x_<split>`, `y_<split>`. torchvision: the
            data set's own split.
        root: torchvision: the folder of its data sets.
        download: torchvision: download files that are missing in `root`.
        image_column: parquet: the column of the images; None: the only column that can contain images.
        label_column: parquet: the column of the labels; None: `label`, if there is one.
    """

    classes: str | None = None
    split: str | None = None
    root: str | None = None
    download: bool = False
    image_column: str | None = None
    label_column: str | None = None


OPTION_KINDS = {
    "classes": ("folder",),
    "split": ("digits", "npz", "torchvision"),
    "root": ("torchvision",),
    "download": ("torchvision",),
    "image_column": ("parquet",),
    "label_column": ("parquet",),
}


def build_source(kind: SourceKind, src: str | None, options: SourceOptions) -> Source:
    """List or count the images of a source.

    Args:
        kind: One of `SourceKind`.
        src: The folder, file, file pattern (webdataset, parquet) or name (torchvision); unused by "digits".
        options: Options that the kind does not support must not be given.
    Raises:
        ValueError: unknown kind, missing `src`, or an option that the kind does not support.
        DataError: the source does not exist, is of another kind, or contains no images.
    """
    if kind not in get_args(SourceKind):
        raise ValueError(f"source kind must be one of {', '.join(get_args(SourceKind))}, not {kind!r}")
    for field in fields(options):
        if getattr(options, field.name) != field.default and kind not in OPTION_KINDS[field.name]:
            raise ValueError(
                f"{field.name}: only for sources of kind {', '.join(OPTION_KINDS[field.name])}, not {kind}"
            )
    if kind == "digits":
        return digits_source(options.split)
    if src is None:
        raise ValueError(f"source kind {kind} needs a path" if kind != "torchvision" else "torchvision needs a name")
    if kind == "npz":
        from pipelines.convert.npz import npz_source

        return npz_source(Path(src), options.split)
    if kind == "webdataset":
        from pipelines.convert.webdataset import webdataset_source

        return webdataset_source(find_files(src, (".tar", ".tar.gz", ".tgz")))
    if kind == "parquet":
        from pipelines.convert.parquet import parquet_source

        return parquet_source(find_files(src, (".parquet",)), options.image_column, options.label_column)
    if kind == "torchvision":
        from pipelines.convert.torchvision_sets import torchvision_source

        return torchvision_source(src, options.root, options.split, download=options.download)
    if kind == "folder":
        return folder_source(Path(src), read_class_list(Path(options.classes)) if options.classes else None)
    return csv_source(Path(src))


def find_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Find files by folder, path, glob pattern, or numbered brace pattern such as `shard-{000..012}.tar`.

    Args:
        pattern: May contain at most one brace range; its numbers have as many digits as the first one.
        suffixes: Suffixes of the files to use in a folder.
    Raises:
        DataError: no files found, or a file of a brace range is missing.
    """
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if brace:
        first, last = int(brace[1]), int(brace[2])
        if not 0 <= last - first < MAX_BRACE_NUMBERS:
            raise DataError(f"{pattern}: the range must rise, by less than {MAX_BRACE_NUMBERS:,}")
        width = len(brace[1])
        numbers = range(first, last + 1)
        found = [f"{pattern[: brace.start()]}{k:0{width}d}{pattern[brace.end() :]}" for k in numbers]
    elif os.path.isdir(pattern):
        found = sorted(entry.path for entry in os.scandir(pattern) if entry.name.endswith(suffixes))
    else:
        found = [pattern] if os.path.exists(pattern) else sorted(glob(pattern))
    if not found:
        raise DataError(f"{pattern}: no such files (a folder is searched for {' '.join(suffixes)})")
    for path in found:
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file")
    return found


def read_class_list(path: Path) -> list[str]:
    """The names in a file with one class a line, sorted; empty lines do not count.

    Raises:
        DataError: it cannot be read, or holds no name or one twice.
    """
    try:
        lines = read_file(path, MAX_CLASS_LIST_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: not a readable list of classes in UTF-8 ({reason})") from error
    names = sorted(filter(None, map(str.strip, lines)))
    if not names:
        raise DataError(f"{path}: no class in it")
    again = next((name for name, after in pairwise(names) if name == after), None)
    if again is not None:
        raise DataError(f"{path}: the class {again} is in it twice")
    return names


def folder_source(folder: Path, only: list[str] | None = None) -> Source:
    """Images in class subfolders (the sorted names are the classes), or directly in the folder (unlabelled).

    Args:
        folder: The folder.
        only: Sorted names of the sub-folders to read; None: all.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
    files = ImageFiles()
    classes = files.folders_in(str(folder))
    if only is not None:
        by_name = {os.path.basename(path): path for path in classes}
        if missing := [name for name in only if name not in by_name]:
            raise DataError(
                f"{folder}: no sub-folder for {len(missing)} of {len(only)} classes: {', '.join(missing[:5])}"
            )
        classes = [by_name[name] for name in only]
    found = files.find(classes)
    flat = files.find([str(folder)], recursive=False)[0]
    images = [path for paths in found for path in paths]
    if images and flat:
        raise DataError(f"{folder}: has images and class sub-folders with images; move one or the other away")
    if not images and not flat:
        raise DataError(f"{folder}: no images in it (looked for {' '.join(sorted(EXTENSIONS))})")
    labels = np.full(len(flat), -1) if flat else np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    return path_source(
        str(folder.resolve()),
        flat or images,
        labels,
        None if flat else [os.path.basename(path) for path in classes],
        num_ignored=files.num_ignored,
        notes=files.notes(str(folder)),
    )


def csv_source(path: Path) -> Source:
    """A table with a column `path`, relative to the table's folder, and optionally `label`: an integer or a class name.

    Sorted class names are numbered from 0, as in `folder_source`; an empty label means no label.
    """
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or []
            if "path" not in columns:
                raise DataError(f"{path}: no column path in it; it has: {', '.join(columns) or 'nothing'}")
            rows = [(row["path"] or "", (row.get("label") or "").strip()) for row in table]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: not a readable table in UTF-8 ({reason})") from error
    if not rows:
        raise DataError(f"{path}: no images in it")
    empty = next((number for number, (image, _) in enumerate(rows, 2) if not image), None)
    if empty is not None:
        raise DataError(f"{path}: row {empty} has no path")
    labels, class_names = _number_labels([label for _, label in rows], path)
    return path_source(str(path.resolve()), [str(path.parent / image) for image, _ in rows], labels, class_names)


def _number_labels(texts: list[str], path: Path) -> tuple[np.ndarray, list[str] | None]:
    if all(re.fullmatch(r"-?\d{1,9}|", text) for text in texts):
        return np.array([checked_label(int(text) if text else None, str(path)) for text in texts]), None
    class_names = sorted(set(texts) - {""})
    numbers = {name: number for number, name in enumerate(class_names)} | {"": -1}
    return np.array([numbers[text] for text in texts]), class_names


def digits_source(split: str | None = None) -> Source:
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8, 16 levels scaled to 255; the label is the digit.

    The split is fixed: 1,297 train, 500 test, stratified. Each digit contributes its share of the 500 test images,
    rounded by largest remainder. The images are chosen by a permutation from numpy's frozen generator RandomState(0).
    The order within a split is scikit-learn's.
    """
    from sklearn.datasets import load_digits  # the import takes a second

    if split not in (None, "train", "test"):
        raise ValueError(f"split: digits has train and test, not {split!r}")
    levels, digit = load_digits(return_X_y=True)
    chosen = np.ones(len(digit), bool)
    if split is not None:
        chosen = _stratified_test_mask(digit, NUM_DIGITS_TEST) == (split == "test")
    images = np.round(levels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)[chosen]
    name = f"scikit-learn digits, {split or 'all'}"
    facts = fingerprint([], images.tobytes())
    return array_source(name, images, digit[chosen], facts, [str(k) for k in range(10)])


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
