"""Chooses the images for an evaluation: the training part for classifiers, and the test part."""

from pathlib import Path

import numpy as np

from fastssl.errors import ConfigError
from fastssl.evaluation.images import Part
from fastssl.evaluation.labels import check_same_classes, num_labelled_classes
from pipelines.beton.duplicates import find_across
from pipelines.hold_out import hold_out_ids
from pipelines.loader import DataConfig, open_train_images
from pipelines.remote.store import is_url
from pipelines.shards.open_images import AnyImages, open_images


def choose_parts(
    data: DataConfig, on: str | Path | None = None, test: str | Path | None = None
) -> tuple[Part, Part, str]:
    """Open the files and split them.

    Args:
        data: Its train, test and holdout_fraction are used.
        on: Another data set to evaluate on, instead of data.train and data.test.
        test: The test file, instead of data.test.

    Returns:
        Training part, test part, and a description of where the test part comes from: its own file or, without one,
        held-out images of the training file. The same files and settings give the same description: results are
        grouped by it.

    Raises:
        ConfigError: too few labels, or classes that differ; the message names the option or the key.
        DataError: a file cannot be read.
    """
    train_key, train = ("--on", open_images(on)) if on else ("data.train", open_train_images(data))
    if num_labelled_classes(train) < 2:
        raise ConfigError(f"{train_key}: {train.path} has fewer than two classes with labels, and evaluation needs two")
    test_path = test or (None if on else data.test)
    if test_path:
        test_key, reader = "--test" if test else "data.test", open_images(test_path)
        check_same_classes(train, reader, test_key)
        shown = str(reader.path if is_url(str(test_path)) else test_path)  # without a password
        return _labelled(train, train.labels >= 0), _labelled(reader, reader.labels >= 0), shown
    return hold_out(train, data.holdout_fraction, "--test is not given" if on else "data.test is not set")


def duplicates_across(train: Part, test: Part) -> str:
    """How many test images are among the training images, as the end of a sentence; "" if none is, or unknown.

    Files without hashes, such as those of other programs, are not compared.
    """
    train_hashes, test_hashes = train.reader.hashes, test.reader.hashes
    if train_hashes is None or test_hashes is None:
        return ""
    is_copy, is_similar = find_across(test_hashes[test.ids], train_hashes[train.ids])
    if not is_copy.any() and not is_similar.any():
        return ""
    return (
        f"; of these {len(test.ids):,} images, {is_copy.sum():,} are copies of training images and "
        f"{is_similar.sum():,} more look almost like one"
    )


def hold_out(reader: AnyImages, fraction: float, why: str) -> tuple[Part, Part, str]:
    """The labelled images of a file in two parts, and a description of the second, the held-out one.

    Raises:
        ConfigError: no labelled image is held out; `why` says why some are needed.
    """
    is_held_out = np.zeros(reader.num_samples, dtype=bool)
    is_held_out[hold_out_ids(reader, fraction)[1]] = True
    is_labelled = reader.labels >= 0
    if not (is_held_out & is_labelled).any():
        raise ConfigError(
            f"{why}, and data.holdout_fraction={fraction:g} holds out no labelled image to evaluate on: give a test "
            "file, or raise data.holdout_fraction"
        )
    train, test = _labelled(reader, is_labelled & ~is_held_out), _labelled(reader, is_labelled & is_held_out)
    return train, test, f"{fraction:g} of {reader.path}, held out ({why})"


def _labelled(reader: AnyImages, wanted: np.ndarray) -> Part:
    return Part(reader=reader, ids=np.flatnonzero(wanted))
