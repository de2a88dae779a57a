"""View specs: the augmentation settings of one view, of which recipes consist."""

import math
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

from kernels.augment.ops import OPS
from kernels.augment.ops.base import Field
from pipelines.config_field import Section, setting, shown

_FIELDS = {"size_px": Field(32, "[1, 4096]")} | {name: field for op in OPS for name, field in op.fields.items()}
_TYPES: dict[type, Any] = {bool: bool, int: int, float: float, tuple: tuple[float, float]}
_Fields: Any = make_dataclass(
    "_Fields",
    [(name, _TYPES[type(each.default)], setting(each.default, each.within)) for name, each in _FIELDS.items()],
    bases=(Section,),
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class ViewSpec(_Fields):
    """Augmentation settings of one view: `size_px`, the side of the square output, and the fields of all ops.

    Their meaning and the order of application are in kernels/augment/ops.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_type(item.name, getattr(self, item.name), item.default)
        super().__post_init__()
        for name, field in _FIELDS.items():
            value = getattr(self, name)
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{name} must be low <= high, not {value}")
            if not field.holds(value):
                raise ValueError(f"{name} must be {field.rule}, not {value}")


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
