"""Whether two files can be judged together: labels, classes."""

import numpy as np

from fastssl.config import Config
from fastssl.errors import ConfigError
from pipelines.beton import BetonReader


def num_labelled_classes(reader: BetonReader) -> int:
    """Number of different labels; images without one (-1) do not count."""
    return len(np.unique(reader.labels[reader.labels >= 0]))


def check_test_data(cfg: Config, train: BetonReader) -> None:
    """Refuse a data.test on which the run could not be evaluated, before the hours and not after them.

    Raises:
        ConfigError: it has no labels, or other classes than the training file.
        DataError: it cannot be read.
    """
    if cfg.data.test is None:
        return
    test = BetonReader(cfg.data.test)
    if num_labelled_classes(test) == 0:
        raise ConfigError(f"data.test: {cfg.data.test} has no labels to be judged by")
    names, test_names = train.class_names, test.class_names
    if names and test_names and names != test_names:
        odd = sorted(set(names) ^ set(test_names)) or test_names
        raise ConfigError(
            f"data.test: {cfg.data.test} has other classes than {cfg.data.train} "
            f"(labels are positions in the list of classes): {', '.join(odd[:5])}"
        )
