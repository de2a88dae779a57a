"""Sources of images: one function for each kind of source."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from pipelines.convert.content import EXTENSIONS
from pipelines.convert.image_files import AGAIN, ImageFiles, describe_kinds
from pipelines.convert.remote_source import SourcePath, find_objects, shown_url
from pipelines.convert.shuffle import pick_from
from pipelines.convert.source import Item, Source, array_source, checked_label, fingerprint, path_source
from pipelines.errors import DataError
from pipelines.files import open_regular, read_file
from pipelines.remote import is_url

Labels = Literal["auto", "folders", "none"]
SourceKind = Literal["folder", "csv", "webdataset", "parquet", "torchvision", "npz", "digits"]
NUM_DIGITS_TEST = 500
MAX_BRACE_NUMBERS = 1_000_000
MAX_CLASS_LIST_BYTES = 16 << 20
MAX_NAMES = 5  # of folders or classes in one line
BRACE_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUET_SUFFIXES = (".parquet",)
REMOTE_KINDS = ("webdataset", "parquet")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options that only some kinds of source support; None or False: not given.

    Attributes:
        classes: folder: a file with the names of the sub-folders to read, one a line; None: all.
        labels: folder: "auto": see `folder_source`; "folders": each sub-folder is a class; "none": no labels.
        split: digits: train, test or None (all). npz: a suffix, arrays `x_<split>`, `y_<split>`. torchvision: the
            data set's own split.
        root: torchvision: the folder of its data sets.
        download: torchvision: download files that are missing in `root`.
        image_column: parquet: the column of the images; None: the only column that can contain images.
        label_column: parquet: the column of the labels; None: `label`, if there is one.
    """

    classes: str | None = None
    labels: Labels = "auto"
    split: str | None = None
    root: str | None = None
    download: bool = False
    image_column: str | None = None
    label_column: str | None = None


OPTION_KINDS = {
    "classes": ("folder",),
    "labels": ("folder",),
    "split": ("digits", "npz", "torchvision"),
    "root": ("torchvision",),
    "download": ("torchvision",),
    "image_column": ("parquet",),
    "label_column": ("parquet",),
}


def build_source(
    kind: SourceKind, src: str | None, options: SourceOptions, met: set[tuple[int, int]] | None = None
) -> Source:
    """List or count the images of a source.

    Args:
        kind: One of `SourceKind`.
        src: The folder, file, file pattern (webdataset, parquet) or name (torchvision); unused by "digits".
        options: Options that the kind does not support must not be given.
        met: Files and folders that other sources hold already, and to which those of this one are added; see
            `ImageFiles`.
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
    if options.labels not in get_args(Labels):
        raise ValueError(f"labels must be one of {', '.join(get_args(Labels))}, not {options.labels!r}")
    if kind == "digits":
        return digits_source(options.split)
    if src is None:
        raise ValueError(f"source kind {kind} needs a path" if kind != "torchvision" else "torchvision needs a name")
    if is_url(src) and kind not in REMOTE_KINDS:
        raise DataError(
            f"{shown_url(src)}: by URL only sources of kind {' and '.join(REMOTE_KINDS)} are read; copy it to a disk"
        )
    if kind == "npz":
        from pipelines.convert.npz import npz_source

        return npz_source(Path(src), options.split)
    if kind == "webdataset":
        from pipelines.convert.webdataset import webdataset_source

        files, others = _find(src, TAR_SUFFIXES)
        return _with_others(webdataset_source(files), others)
    if kind == "parquet":
        from pipelines.convert.parquet import parquet_source

        files, others = _find(src, PARQUET_SUFFIXES)
        return _with_others(parquet_source(files, options.image_column, options.label_column), others)
    if kind == "torchvision":
        from pipelines.convert.torchvision_sets import torchvision_source

        return torchvision_source(src, options.root, options.split, download=options.download)
    if kind == "folder":
        only = read_class_list(Path(options.classes)) if options.classes else None
        return folder_source(Path(src), only, options.labels, met)
    return csv_source(Path(src))


def join_sources(sources: list[Source]) -> Source:
    """One source after the other as one; classes of one name become one class, and all names are sorted.

    Raises:
        DataError: a source has labels without names, and another one has names; when such a label is read.
    """
    if len(sources) == 1:
        return sources[0]
    names = sorted({name for source in sources for name in source.class_names or ()})
    number = {name: k for k, name in enumerate(names)}

    def labels_of(source: Source) -> dict[int, int] | None:
        """From a source's labels to those of all sources; None: they are the same."""
        if not names:
            return None
        return {-1: -1} | {k: number[name] for k, name in enumerate(source.class_names or ())}

    def relabelled(item: Item, new_labels: dict[int, int] | None) -> Item:
        label = item.label if new_labels is None else new_labels.get(item.label)
        if label is None:
            raise DataError(
                f"{item.name}: label {item.label} has no name, but the labels of other sources have; convert the "
                "sources one by one"
            )
        return item._replace(label=label)

    def read(start: int, stop: int) -> Iterator[Item]:
        first = 0
        for source in sources:
            new_labels, num = labels_of(source), source.num_items
            if first < stop and start < first + num:
                for item in source.read(max(start - first, 0), min(stop - first, num)):
                    yield relabelled(item, new_labels)
            first += num

    def pick(numbers: Iterator[int]) -> Iterator[Item]:
        new_labels = [labels_of(source) for source in sources]
        for k, item in pick_from(sources, numbers):
            yield relabelled(item, new_labels[k])

    num_unlabelled = [source.name for source in sources if not source.class_names]
    note = f"without names of classes: {', '.join(num_unlabelled[:MAX_NAMES])}; the other sources have classes"
    return Source(
        name=" and ".join(source.name for source in sources),
        num_items=sum(source.num_items for source in sources),
        read=read,
        pick=pick,
        fingerprint=fingerprint([], " ".join(source.fingerprint for source in sources).encode()),
        class_names=names or None,
        notes=tuple(line for source in sources for line in source.notes) + (note,) * bool(names and num_unlabelled),
        left_out=[found for source in sources for found in source.left_out],
        num_left_out=sum((source.num_left_out for source in sources), Counter()),
    )


def _find(src: str, suffixes: tuple[str, ...]) -> tuple[list[SourcePath], list[str]]:
    """The files of a source, and what else is in its folder."""
    if is_url(src):
        found, others = find_objects(src, suffixes, expand_braces)
        return list(found), [f"{found[0].shown.rpartition('/')[0]}/{name}" for name in others]
    files = find_files(src, suffixes)
    if not os.path.isdir(src):
        return list(files), []
    names = sorted(set(os.listdir(src)) - {os.path.basename(path) for path in files})
    return list(files), [os.path.join(src, name) for name in names]


def _with_others(source: Source, others: list[str]) -> Source:
    """Add what else the folder of a source's files holds."""
    kinds = [os.path.splitext(path)[1].lower() or "without extension" for path in others]
    left_out = list(zip(others, kinds, strict=True))
    return replace(source, left_out=left_out, num_left_out=source.num_left_out + Counter(kinds))


def find_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Find files by folder, path, glob pattern, or numbered brace pattern such as `shard-{000..012}.tar`.

    Args:
        pattern: May contain at most one brace range; its numbers have as many digits as the first one.
        suffixes: Suffixes of the files to use in a folder.
    Raises:
        DataError: no files found, or a file of a brace range is missing.
    """
    expanded = expand_braces(pattern)
    if expanded is not None:
        found = expanded
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


def expand_braces(pattern: str) -> list[str] | None:
    """The names that a numbered brace pattern stands for; None: it is another name.

    Raises:
        DataError: the range does not rise, or has too many numbers.
    """
    brace = BRACE_RANGE.search(pattern)
    if brace is None:
        return None
    first, last = int(brace[1]), int(brace[2])
    if not 0 <= last - first < MAX_BRACE_NUMBERS:
        raise DataError(f"{pattern}: the range must rise, by less than {MAX_BRACE_NUMBERS:,}")
    width = len(brace[1])
    return [f"{pattern[: brace.start()]}{k:0{width}d}{pattern[brace.end() :]}" for k in range(first, last + 1)]


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


def folder_source(
    folder: Path, only: list[str] | None = None, labels: Labels = "auto", met: set[tuple[int, int]] | None = None
) -> Source:
    """Images in a folder; those in its sub-folders have the sub-folder as their class.

    The classes are the sorted names of the sub-folders with images. With labels="auto", sub-folders are no classes
    where they tell nothing apart: one holds all images, each holds one image, or all have names of splits (train, val).
    A note says so.

    Args:
        folder: The folder.
        only: Sorted names of the sub-folders to read, each of which is a class; None: all.
        labels: "auto"; "folders": each sub-folder is a class, also without images; "none": no labels.
        met: See `build_source`.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
    is_first = not met
    files = ImageFiles(met)
    folders = files.folders_in(str(folder))
    if only is not None:
        by_name = {os.path.basename(path): path for path in folders}
        if missing := [name for name in only if name not in by_name]:
            raise DataError(f"{folder}: no sub-folder for {len(missing)} of {len(only)} classes: {_some(missing)}")
        folders = [by_name[name] for name in only]
    found = dict(zip(folders, files.find(folders), strict=True))
    flat = files.find([str(folder)], recursive=False)[0]
    if not flat and not any(found.values()):
        raise DataError(_without_images(folder, files, is_first=is_first))
    notes = []
    empty = [os.path.basename(path) for path, images in found.items() if not images]
    if empty and only is None and labels != "folders":
        make = "sub-folder without images makes" if len(empty) == 1 else "sub-folders without images make"
        notes.append(f"{folder}: {len(empty):,} {make} no class: {_some(empty)}")
        found = {path: images for path, images in found.items() if images}
    nested = [image for images in found.values() for image in images]
    why_none = labels == "none" or (
        labels == "auto" and only is None and nested and _why_no_labels(folder, found, bool(flat))
    )
    if not nested or why_none:
        classes, numbers = None, np.full(len(nested) + len(flat), -1)
    else:
        classes = [os.path.basename(path) for path in found]
        numbers = np.repeat([*range(len(classes)), -1], [*map(len, found.values()), len(flat)])
    if isinstance(why_none, str):
        notes.append(why_none)
    elif classes and flat:
        lie = "image lies in no sub-folder and gets" if len(flat) == 1 else "images lie in no sub-folder and get"
        notes.append(f"{folder}: {len(flat):,} {lie} no label")
    return path_source(
        str(folder.resolve()), nested + flat, numbers, classes, notes=tuple(notes), left_out=files.left_out
    )


def _why_no_labels(folder: Path, found: dict[str, list[str]], has_flat: bool) -> str | None:
    """Why the sub-folders with images are no classes, as a line; None: they are."""
    names = [os.path.basename(path) for path in found]
    advice = "so none is written; --labels folders makes them classes"
    if len(names) == 1:
        where = (
            f"the one sub-folder with images, {names[0]}, is no label"
            if has_flat
            else f"all images are in one sub-folder, {names[0]}, which is no label"
        )
        return f"{folder}: {where}, {advice}; if it holds classes, convert {next(iter(found))}"
    if all(len(images) == 1 for images in found.values()):
        return f"{folder}: each of {len(names):,} sub-folders holds one image, which is no label, {advice}"
    if all(name.lower() in SPLIT_NAMES for name in names):
        return f"{folder}: sub-folders named {_some(names)} are splits, not labels, {advice}; or convert each by itself"
    return None


def _without_images(folder: Path, files: ImageFiles, *, is_first: bool) -> str:
    kinds = Counter(kind for _, kind in files.left_out)
    if kinds[AGAIN] and not is_first:
        return f"{folder}: all its images are in the sources before it; leave it out"
    instead = f"; there are instead: {describe_kinds(kinds)}" if kinds else ""
    wanted = " ".join(sorted(EXTENSIONS))
    return f"{folder}: no images in it (looked for {wanted}, and at the content of other files){instead}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


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
