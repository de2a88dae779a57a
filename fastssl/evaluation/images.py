"""The images of a task, plain and augmented, read by the project's own loaders."""

# B batch size, n images of a part

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.evaluation.config import EvalConfig, with_pairs
from pipelines.loader import DataConfig, EvalLoader, Loader, build_eval_loader, build_loader
from pipelines.shards.open_images import AnyImages
from pipelines.view_spec import ViewSpec
from pipelines.views import ViewsConfig, build_eval_spec

# Views of supervised training: RandomResizedCrop's defaults and the flip (as in torchvision's references).
PLAIN_AUGMENTATION: dict[str, Any] = {"crop_scale": (0.08, 1.0), "jitter_p": 0.0, "grayscale_p": 0.0}
_EPOCHS_OF_SEED = 1 << 16  # epochs of different repetitions must not have the same number


@dataclass(frozen=True, kw_only=True)
class Part:
    """Labelled images of one file.

    Attributes:
        reader: The open file.
        ids: Ids of its samples in this part, int64 [n], ascending.
    """

    reader: AnyImages
    ids: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]."""
        return self.reader.labels[self.ids]


class Images:
    """Random views of training images, and plain views of both parts; no labels.

    Attributes:
        encoder: The encoder to evaluate; users must not modify it.
    """

    def __init__(
        self,
        cfg: EvalConfig,
        data: DataConfig,
        views: ViewsConfig,
        encoder: nn.Module,
        *,
        train: Part,
        test: Part,
        device: torch.device,
    ) -> None:
        self.encoder = encoder
        self._cfg, self._data, self._views, self._device = cfg, data, views, device
        self._train, self._test = train, test
        self._position = np.full(train.reader.num_samples, -1)
        self._position[train.ids] = np.arange(len(train.ids))
        self._loader: Loader | None = None

    def augmented(
        self, positions: np.ndarray, seed: int, epoch: int
    ) -> tuple[int, Iterator[tuple[Tensor, np.ndarray]]]:
        """One epoch of random views of some training images.

        The loader reads the whole file; other images are removed from its batches, which therefore differ in size.

        Args:
            positions: Positions in the training part, int64.
            seed: Seed of the repetition.
            epoch: Number of the epoch, < 65,536.

        Returns:
            The number of batches, and an iterator of views [B, 3, H, W] on the device and positions int64 [B].
        """
        loader = self._loader = self._loader or self._build_loader()
        return len(loader), self._iterate(loader, positions, seed * _EPOCHS_OF_SEED + epoch)

    def plain_train(self, positions: np.ndarray) -> Iterator[Tensor]:
        """Plain views [B, 3, H, W] of the training images at these positions, in this order."""
        return self._plain(Part(reader=self._train.reader, ids=self._train.ids[positions]))

    def plain_test(self) -> Iterator[Tensor]:
        """Plain views of the test images in order."""
        return self._plain(self._test)

    def close(self) -> None:
        """Stop the loaders' threads."""
        if self._loader:
            self._loader.close()

    def _iterate(self, loader: Loader, positions: np.ndarray, epoch: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        is_wanted = np.zeros(len(self._train.ids) + 1, dtype=bool)  # the last entry is that of position -1
        is_wanted[positions] = True
        with closing(loader.epoch(epoch)) as batches:
            for batch in batches:
                found = self._position[batch.sample_ids.cpu().numpy()]
                rows = np.flatnonzero(is_wanted[found])
                yield batch.views[0][torch.from_numpy(rows).to(self._device)], found[rows]

    def _plain(self, part: Part) -> Iterator[Tensor]:
        loader = build_plain_loader(self._cfg, self._data, self._views, part.reader, self._device, part.ids)
        with closing(loader):
            for batch in loader:
                yield batch.views[0]

    def _build_loader(self) -> Loader:
        reader = self._train.reader
        size = min(self._cfg.sgd_batch_size, reader.num_samples)
        # A damaged image ends the evaluation, since its substitute could be a held-out image.
        data = engine_for(self._data, reader, self._device)
        data = replace(data, global_batch_size=size, max_bad_fraction=0.0)
        process = {"rank": 0, "world_size": 1, "device": self._device, "num_threads": torch.get_num_threads()}
        return build_loader(reader, data, augmented_views(self._cfg, self._views), seed=0, **process)


def augmented_views(cfg: EvalConfig, views: ViewsConfig) -> ViewsConfig:
    """One random view of the plain view's size: crop and flip, with the changes of eval.augment."""
    size = {"size_px": build_eval_spec(views).size_px}
    fields: dict[str, Any] = PLAIN_AUGMENTATION | size | with_pairs(cfg.augment)
    spec = asdict(ViewSpec(**fields))
    return replace(views, recipe="linear_augmented", specs=[spec], size_px=None, override={})


def engine_for(data: DataConfig, reader: AnyImages, device: torch.device) -> DataConfig:
    """The settings with an engine that takes this file: the training's need not, which was chosen for another file."""
    if data.engine == "resident" and device.type == "cuda" and not (reader.sizes == reader.sizes[0]).all():
        return replace(data, engine="ffcv")
    return data


def build_plain_loader(
    cfg: EvalConfig,
    data: DataConfig,
    views: ViewsConfig,
    reader: AnyImages,
    device: torch.device,
    ids: np.ndarray | None = None,
) -> EvalLoader:
    """The plain views of a file, or of some of its images."""
    return build_eval_loader(
        reader,
        views,
        local_batch_size=cfg.local_batch_size,
        engine=engine_for(data, reader, device).engine,
        device=device,
        sample_ids=ids,
        num_workers=data.num_workers,
    )
