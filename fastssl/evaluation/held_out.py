"""kNN accuracy on held-out training images while a run trains; it never reads test images."""

# N fit images, M held-out images, W ranks, F features

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fastssl import collectives
from fastssl.errors import ConfigError
from fastssl.evaluation.config import EvalConfig, values_of
from fastssl.evaluation.features import encode_batches
from fastssl.evaluation.images import build_plain_loader
from fastssl.evaluation.knn import bounded_k, bounded_k_line, knn_votes
from fastssl.evaluation.parts import hold_out
from pipelines.loader import DataConfig
from pipelines.shards.open_images import AnyImages
from pipelines.views import ViewsConfig

MAX_FIT, MAX_HELD_OUT = 50_000, 10_000  # images; at ImageNet's 1.28 million, a kNN of all would take an epoch's time


class HeldOutKnn:
    """Classifies the held-out images by their nearest neighbours among the others, as `fastssl eval` does with knn.

    Each rank encodes and classifies its share of the images. Of larger data sets, at most MAX_FIT and MAX_HELD_OUT
    images are used.
    """

    def __init__(
        self, cfg: EvalConfig, data: DataConfig, views: ViewsConfig, reader: AnyImages, device: torch.device
    ) -> None:
        """Choose the images.

        Args:
            cfg: The first of its knn_k, bounded as in `fastssl eval`, and of its knn_temperature are used.
            data: Its holdout_fraction is used, and the settings of its engine.
            views: Their plain view is used.
            reader: The training file.
            device: The encoder's.
        Raises:
            ConfigError: no labelled image is held out, there are too few to choose k, or fewer than two classes.
        """
        self._cfg, self._data, self._views = cfg, data, views
        self._reader, self._device = reader, device
        labels = reader.labels[reader.labels >= 0]
        if len(np.unique(labels)) < 2:
            raise ConfigError(f"eval.every_epochs: {reader.path} holds fewer than two labelled classes: leave it out")
        fit, held_out, _ = hold_out(reader, data.holdout_fraction, "eval.every_epochs is set")
        self._fit, self._held_out = _some(fit.ids, MAX_FIT), _some(held_out.ids, MAX_HELD_OUT)
        try:
            self._k = bounded_k(cfg, reader.labels[self._fit])[0]
        except ValueError as error:
            raise ConfigError(f"eval.every_epochs: {error}") from None
        if collectives.rank() == 0 and (line := bounded_k_line(cfg, reader.labels[self._fit])):
            print(f"fastssl: {line}", file=sys.stderr, flush=True)
        self._num_classes = int(labels.max()) + 1

    def top1(self, backbone: nn.Module) -> float:
        """The fraction of held-out images that are classified correctly, in [0, 1] (all ranks call it)."""
        pair = (self._k, values_of(self._cfg.knn_temperature)[0])
        num_fit, num_held_out, labels = len(self._fit), len(self._held_out), self._reader.labels
        fit, ids = _share(self._fit), _share(self._held_out)
        with _mean_buffers(backbone):
            features = self._encode(backbone, np.concatenate([fit, ids]))
        bank = collectives.gather(torch.from_numpy(features[: len(fit)]).to(self._device)).flatten(0, 1)[:num_fit]
        (votes,) = knn_votes(
            bank.cpu().numpy(),
            labels[self._fit],
            features[len(fit) :],
            [pair],
            num_classes=self._num_classes,
            device=self._device,
        )
        is_correct = votes.argmax(1) == labels[ids]
        # The rest of a share is filled up.
        num_own = min(max(num_held_out - collectives.rank() * len(ids), 0), len(ids))
        num_correct = torch.tensor(float(is_correct[:num_own].sum()), device=self._device)
        return collectives.EXCHANGE.sum_(num_correct).item() / num_held_out

    def _encode(self, backbone: nn.Module, ids: np.ndarray) -> np.ndarray:
        # `resident` would decode the whole file once more.
        data = replace(self._data, engine="ffcv") if self._data.engine == "resident" else self._data
        loader = build_plain_loader(self._cfg, data, self._views, self._reader, self._device, ids)
        with closing(loader):
            return np.concatenate(list(encode_batches(backbone, loader)))


def _some(ids: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the ids, evenly spaced."""
    return ids[np.linspace(0, len(ids) - 1, min(len(ids), most)).astype(np.int64)]


def _share(ids: np.ndarray) -> np.ndarray:
    """This rank's ids: contiguous, equally many on every rank; the last shares are filled up with the first ids."""
    size = -(-len(ids) // collectives.world_size())
    return np.resize(ids, size * collectives.world_size())[collectives.rank() * size :][:size]


@contextmanager
def _mean_buffers(module: nn.Module) -> Iterator[None]:
    """Replace floating-point buffers by their means over ranks, as in a checkpoint's weights; restored afterwards."""
    own = {buffer: buffer.clone() for buffer in module.buffers() if buffer.is_floating_point()}
    try:
        for buffer in own:
            collectives.all_mean_(buffer)
        yield
    finally:
        for buffer, value in own.items():
            buffer.copy_(value)
