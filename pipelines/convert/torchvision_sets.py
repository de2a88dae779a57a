"""Data sets from torchvision, by class name."""

import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, Image

from pipelines import downloads
from pipelines.convert.source import Item, Source, checked_label, fingerprint, path_source
from pipelines.errors import DataError, one_line
from pipelines.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()
from torchvision import datasets  # noqa: E402

# Attributes that contain the files of a data set and, in the same order, their labels.
FILE_LISTS = (("_image_files", "_labels"), ("_images", "_labels"))


def torchvision_source(name: str, root: str | None, split: str | None, *, download: bool) -> Source:
    """A classification data set from torchvision.datasets.

    If the data set is a list of files, JPEG files keep their bytes. Decoded images are encoded like those of any other
    source. torchvision reads the files on disk: CIFAR's are pickles, which torchvision loads only after comparing their
    MD5 with the published ones. Nothing is unpickled here.

    Args:
        name: As in torchvision.datasets, e.g. CIFAR10.
        root: The folder of the data sets.
        split: train, test or another split name of the data set; None: the data set's default.
        download: Download missing files.
    Raises:
        ValueError: no `root`, an unknown name or split.
        DataError: the data do not exist, or torchvision rejects them.
    """
    # Some data sets open their files with Pillow, which would start Ghostscript for a PostScript file.
    EpsImagePlugin.gs_binary = False
    if root is None:
        raise ValueError("root: torchvision needs the folder of its data sets")
    dataset = _open(_class_of(name), name, root, split, download=download)
    num_items, class_names = len(dataset), _class_names(dataset)
    label = f"torchvision {name}, {split or 'default split'}, in {root}"
    files = _files(dataset, num_items)
    if files is not None:
        labels = np.array([checked_label(number, path) for path, number in files])
        return path_source(label, [path for path, _ in files], labels, class_names)

    def pick(numbers: Iterable[int]) -> Iterator[Item]:
        for i in numbers:
            image, target = dataset[i]
            if not isinstance(image, Image.Image):
                raise DataError(f"torchvision {name}: its samples are {type(image).__name__}, not images")
            number = checked_label(target if isinstance(target, int | np.integer) else None, f"{label}, image {i}")
            yield Item(f"{label}, image {i}", image, number)

    facts = fingerprint([], f"{label} {num_items} {dataset!r}".encode())
    return Source(
        name=label,
        num_items=num_items,
        read=lambda start, stop: pick(range(start, stop)),
        pick=pick,
        fingerprint=facts,
        class_names=class_names,
    )


def _class_of(name: str) -> Any:
    found = getattr(datasets, name, None)
    if not inspect.isclass(found) or not issubclass(found, datasets.VisionDataset):
        raise ValueError(f"torchvision.datasets has no data set {name!r}; names are written as there, e.g. CIFAR10")
    return found


def _open(kind: Any, name: str, root: str, split: str | None, *, download: bool) -> Any:
    options = inspect.signature(kind.__init__).parameters
    given: dict[str, Any] = {"root": root}
    if split is not None and "train" in options:
        if split not in ("train", "test"):
            raise ValueError(f"split: {name} has train and test, not {split!r}")
        given["train"] = split == "train"
    elif split is not None and "split" in options:
        given["split"] = split
    elif split is not None:
        raise ValueError(f"split: {name} has none")
    if download:
        if "download" not in options:
            raise ValueError(f"download: torchvision cannot download {name}")
        given["download"] = True
    try:
        with downloads.limited_silence():
            return kind(**given)
    except Exception as error:  # each data set raises its own types of exceptions
        reason = one_line(error)
        if download and "timed out" in reason:
            silence = f"no answer for {downloads.MAX_SILENCE_S:g} s"
            reason = f"{silence}; check the network, or put the files there by other means"
        raise DataError(f"torchvision {name} in {root}: {reason}") from error


def _files(dataset: Any, num_items: int) -> list[tuple[str, Any]] | None:
    samples = getattr(dataset, "samples", None)
    if samples is None:
        for paths, labels in FILE_LISTS:
            if hasattr(dataset, paths) and hasattr(dataset, labels):
                samples = list(zip(getattr(dataset, paths), getattr(dataset, labels), strict=False))
    if not isinstance(samples, list) or len(samples) != num_items:
        return None
    if not all(isinstance(path, str | os.PathLike) and isinstance(label, int) for path, label in samples):
        return None
    return [(str(path), label) for path, label in samples]


def _class_names(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    return list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else None
