"""Which images of a data set are held out: never learned from by a probe or a classifier, but judged with."""

# N samples

import numpy as np

from pipelines.beton import BetonReader
from pipelines.order.keyed import position_of
from pipelines.sampler import split_holdout
from pipelines.shards.open_images import AnyImages

# A prime: no period of a data set, such as one image of each class in turn, divides it.
_PERIOD = 65_537
_SEED, _EPOCH, _STREAM = 0, 0, (1 << 32) - 3  # the same in every run


def holdout_table(images: AnyImages, fraction: float) -> np.ndarray:
    """Whether a sample is held out: entry (id modulo the length) of a table, bool.

    Of one file, the table has an entry for each sample, stratified by class (`sampler.split_holdout`). Of a data set of
    many, it is short whatever N: with 65,537 images or more, within 65,537 of them each class has its share on average.
    """
    if not isinstance(images, BetonReader):
        num = min(images.num_samples, _PERIOD)
        return position_of(np.arange(num), num, _SEED, _EPOCH, _STREAM) < round(num * fraction)
    is_held_out = np.zeros(images.num_samples, bool)
    is_held_out[split_holdout(images.num_samples, fraction, images.labels)[1]] = True
    return is_held_out


def hold_out_ids(images: AnyImages, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The samples that are not held out, and those that are: int64, each ascending; together 0..N-1."""
    table = holdout_table(images, fraction)
    ids = np.arange(images.num_samples)
    is_held_out = table[ids % len(table)]
    return ids[~is_held_out], ids[is_held_out]
