"""The reference engine: Pillow decodes, torchvision resizes, one sample after the other. Slow but simple."""

from collections.abc import Generator, Iterator

import numpy as np
import torch

from pipelines.batch import RawBatch
from pipelines.engines import BatchPlan, Groups
from pipelines.samples import ImageSet, decode_sample
from pipelines.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()
from torchvision.transforms.v2 import functional as v2  # noqa: E402


class TorchEngine:
    """Reference for testing the other engines: torchvision v2's resized_crop on float32, rounded once."""

    def __init__(self, images: ImageSet) -> None:
        self._path = images.path

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`."""
        for plan in plans:
            samples, params = plan.samples, plan.params
            views = [np.empty((len(samples), len(members), size, size, 3), np.uint8) for size, members in groups]
            for row in range(len(samples)):
                pixels = decode_sample(self._path, samples, row)
                image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))
                for (size_px, members), out in zip(groups, views, strict=True):
                    for slot, view in enumerate(members):
                        out[row, slot] = resized_crop(image, params["crop_box"][row, view].tolist(), size_px)
            yield RawBatch(views=views, params=params, labels=samples.labels, sample_ids=samples.ids)

    def close(self) -> None:
        """Nothing to stop."""


def resized_crop(image: torch.Tensor, box: list[int], size_px: int) -> np.ndarray:
    """Crop and resize one view.

    Args:
        image: Levels 0..255, float32 [3, H, W].
        box: Top, left, height, width in pixels.
        size_px: Side S of the output.
    Returns:
        uint8 [S, S, 3].
    """
    top, left, height, width = box
    view = v2.resized_crop(image, top, left, height, width, [size_px, size_px], antialias=True)
    return view.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
