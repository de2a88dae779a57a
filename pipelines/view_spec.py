"""View specs: the augmentation settings of one view, of which recipes consist."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Augmentation settings of one view, with the ops in the order of application; semantics as in torchvision v2.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    size_px: int = 32  # side of the square output
    crop: bool = True  # RandomResizedCrop; False: the whole image is resized
    crop_scale: Range = (0.2, 1.0)  # share of the image's area
    crop_ratio: Range = (3 / 4, 4 / 3)  # width / height
    affine_p: float = 0.0  # RandomAffine, bilinear, fill 0
    affine_degrees: float = 0.0  # rotation in [-degrees, degrees]
    affine_translate_fraction: float = 0.0  # of the side, rounded to whole pixels
    affine_scale: Range = (1.0, 1.0)
    affine_shear_degrees: float = 0.0  # in x and in y, each in [-degrees, degrees]
    flip_p: float = 0.5  # horizontal
    jitter_p: float = 0.8  # ColorJitter; its four parts are applied in a uniformly drawn order
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # turns
    grayscale_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: Range = (0.1, 2.0)  # output pixels
    blur_kernel_px: int = 23
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), item.default)
            if item.name.endswith("_p"):
                self._check(item.name, lambda p: 0 <= p <= 1, "in [0, 1]")
        for name in ("crop_scale", "crop_ratio", "affine_scale", "blur_sigma"):
            self._check(name, lambda pair: 0 < pair[0] <= pair[1], "positive, low <= high")
        for name in ("brightness", "contrast", "saturation", "affine_degrees"):
            self._check(name, lambda x: x >= 0, ">= 0")
        self._check("crop_scale", lambda pair: pair[1] <= 1, "at most 1")
        self._check("affine_shear_degrees", lambda x: 0 <= x < 90, "in [0, 90)")
        self._check("hue", lambda x: 0 <= x <= 0.5, "in [0, 0.5]")
        self._check("affine_translate_fraction", lambda x: 0 <= x <= 1, "in [0, 1]")
        self._check("solarize_threshold", lambda x: 0 <= x <= 1, "in [0, 1]")
        self._check("size_px", lambda x: x >= 1, ">= 1")
        self._check("blur_kernel_px", lambda x: x >= 1 and x % 2 == 1, "odd and >= 1")

    def _check(self, name: str, holds: Callable[[Any], bool], rule: str) -> None:
        if not holds(getattr(self, name)):
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class EvalViewSpec:
    """The deterministic evaluation view: a resized central square. crop_fraction 0.875 is "resize 256, crop 224"."""

    size_px: int = 32
    crop_fraction: float = 1.0  # side of the square / shorter side of the image

    def __post_init__(self) -> None:
        if self.size_px < 1 or not 0 < self.crop_fraction <= 1:
            raise ValueError(f"size_px must be >= 1 and crop_fraction in (0, 1], got {self}")


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise ValueError unless value has the type of the field's default; a float field accepts an int."""

    def is_number(x: Any) -> bool:
        return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)

    matches = {
        bool: lambda: isinstance(value, bool),
        int: lambda: isinstance(value, int) and not isinstance(value, bool),
        float: lambda: is_number(value),
        tuple: lambda: isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value)),
    }[type(default)]
    if not matches():
        expected = "a pair of numbers" if type(default) is tuple else f"a {type(default).__name__}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
