"""View specs: the augmentation settings of one view, of which recipes consist."""

import math
from dataclasses import dataclass, fields
from typing import Any

from pipelines.config_field import Section, setting, shown

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ViewSpec(Section):
    """Augmentation settings of one view, with the ops in the order of application; semantics as in torchvision v2.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    size_px: int = setting(32, "[1, 4096]")  # side of the square output
    crop: bool = True  # RandomResizedCrop; False: the whole image is resized
    crop_scale: Range = setting((0.2, 1.0), "[1e-6, 1]")  # share of the image's area
    crop_ratio: Range = setting((3 / 4, 4 / 3), "[1e-3, 1e3]")  # width / height
    affine_p: float = setting(0.0, "[0, 1]")  # RandomAffine, bilinear, fill 0
    affine_degrees: float = setting(0.0, "[0, 360]")  # rotation in [-degrees, degrees]
    affine_translate_fraction: float = setting(0.0, "[0, 1]")  # of the side, rounded to whole pixels
    affine_scale: Range = setting((1.0, 1.0), "[1e-3, 1e3]")
    affine_shear_degrees: float = setting(0.0, "[0, 90)")  # in x and in y, each in [-degrees, degrees]
    flip_p: float = setting(0.5, "[0, 1]")  # horizontal
    jitter_p: float = setting(0.8, "[0, 1]")  # ColorJitter; its four parts are applied in a uniformly drawn order
    brightness: float = setting(0.4, "[0, 100]")
    contrast: float = setting(0.4, "[0, 100]")
    saturation: float = setting(0.4, "[0, 100]")
    hue: float = setting(0.1, "[0, 0.5]")  # turns
    grayscale_p: float = setting(0.2, "[0, 1]")
    blur_p: float = setting(0.0, "[0, 1]")
    blur_sigma: Range = setting((0.1, 2.0), "[1e-3, 1e3]")  # output pixels
    blur_kernel_px: int = setting(23, "[1, 999]")
    solarize_p: float = setting(0.0, "[0, 1]")
    solarize_threshold: float = setting(0.5, "[0, 1]")

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), item.default)
        super().__post_init__()
        for name in ("crop_scale", "crop_ratio", "affine_scale", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be low <= high, not {(low, high)}")
        if self.blur_kernel_px % 2 == 0:
            raise ValueError(f"blur_kernel_px must be odd, not {self.blur_kernel_px}")


@dataclass(frozen=True, kw_only=True)
class EvalViewSpec(Section):
    """The deterministic evaluation view: a resized central square. crop_fraction 0.875 is "resize 256, crop 224"."""

    size_px: int = setting(32, "[1, 4096]")
    crop_fraction: float = setting(1.0, "[0.01, 1]")  # side of the square / shorter side of the image


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
        raise ValueError(f"{name} must be {expected}, not {shown(value)}")
