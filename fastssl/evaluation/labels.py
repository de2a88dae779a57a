"""Checks that files have labels, and that training and test file have the same classes."""

import numpy as np

from fastssl.errors import ConfigError
from pipelines.shards.mixed_images import MixedImages
from pipelines.shards.open_images import AnyImages
from pipelines.shards.sharded_images import ShardedImages


def num_labelled_classes(reader: AnyImages) -> int:
    """Number of distinct labels; images without a label (-1) are ignored."""
    return len(_classes(reader))


def max_label(reader: AnyImages) -> int:
    """The largest label; -1: there is none."""
    return int(_classes(reader).max(initial=-1))


def check_same_classes(train: AnyImages, test: AnyImages, test_key: str) -> None:
    """Refuse a test file on which classifiers of the training file cannot be evaluated.

    Args:
        train: The training file; if it has no labels, nothing is evaluated and the check passes.
        test: The test file.
        test_key: The option or key that named it, for the error message.

    Raises:
        ConfigError: it has no labels, or other classes than the training file.
    """
    if num_labelled_classes(test) == 0:
        raise ConfigError(f"{test_key}: {test.path} has no labels, which evaluation needs")
    names, test_names = train.class_names, test.class_names
    if names and test_names and names != test_names:
        odd = sorted(set(names) ^ set(test_names)) or test_names
        raise ConfigError(
            f"{test_key}: the classes of {test.path} differ from those of {train.path}, or their order does "
            f"(a label is a position in the list of classes): {', '.join(odd[:5])}"
        )
    unknown = np.setdiff1d(_classes(test), _classes(train))
    if len(unknown) and num_labelled_classes(train):
        raise ConfigError(
            f"{test_key}: {test.path} has labels that do not occur in {train.path}: {', '.join(map(str, unknown[:5]))}"
        )


def _classes(reader: AnyImages) -> np.ndarray:
    if isinstance(reader, ShardedImages):  # the manifest knows, however many images there are
        return np.flatnonzero(reader.manifest.label_counts)
    if isinstance(reader, MixedImages):
        of_sources = [_classes(source) for source in reader.sources] if reader.has_labels else []
        return np.unique(np.concatenate([np.empty(0, np.int64), *of_sources]))
    return np.unique(reader.labels[reader.labels >= 0])
