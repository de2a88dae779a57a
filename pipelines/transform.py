"""The plain view of one image, for an encoder in use: the same pixels that evaluation sees."""

# H and W the image's sides, S the view's, in pixels

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.convert.images import CorruptImageError, read_upright, upright_rgb
from pipelines.draw import eval_params
from pipelines.errors import DataError
from pipelines.resample import resized_crop
from pipelines.views import ViewsConfig, build_eval_spec


class EvalTransform:
    """Centre crop, antialiased resize, normalisation: an image to float32 [3, S, S], in milliseconds on one core.

    Attributes:
        size_px: S.
        mean: Of each channel, in [0, 1]; taken off.
        std: Of each channel; divided by.
    """

    def __init__(self, views: ViewsConfig) -> None:
        """The eval view of a views section; see `pipelines.views.build_eval_spec`."""
        self.mean, self.std = tuple(views.mean), tuple(views.std)
        self._spec = build_eval_spec(views)
        self.size_px = self._spec.size_px

    def __call__(self, image: Any) -> Tensor:
        """Prepare one image.

        Args:
            image: A PIL image (converted as `fastssl convert` does: upright, RGB, transparency on white), or levels
                uint8 [H, W, 3], an array or a tensor.

        Raises:
            TypeError: It is something else.
            ValueError: A PIL image that cannot be converted.
        """
        from kernels.augment import augment

        levels = _levels(image)
        params = eval_params(self._spec, np.array([levels.shape[:2]]))
        pixels = np.empty((1, 1, self.size_px, self.size_px, 3), np.uint8)
        top_px, left_px, height_px, width_px = params["crop_box"][0, 0].tolist()
        resized_crop(levels, top_px, left_px, height_px, width_px, pixels[0, 0])
        (view,) = augment(pixels, params, mean=self.mean, std=self.std, num_threads=1)
        return view[0].contiguous()

    def __repr__(self) -> str:
        crop = self._spec.crop_fraction
        return f"EvalTransform(size_px={self.size_px}, crop_fraction={crop}, mean={self.mean}, std={self.std})"


def read_image(path: Path) -> np.ndarray:
    """Read an image file as `fastssl convert` does: uint8 RGB [H, W, 3], upright, transparency on white.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return read_upright(str(path))
    except CorruptImageError as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None


def _levels(image: Any) -> np.ndarray:
    if isinstance(image, Image.Image):
        try:
            image = upright_rgb(image)
        except CorruptImageError as error:
            raise ValueError(f"the image cannot be used: {error}") from None
    if isinstance(image, torch.Tensor):
        image = image.numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"an image must be a PIL image or uint8 [height, width, 3], got {found}")
    return np.ascontiguousarray(image)
