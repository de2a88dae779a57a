"""Sections of the configuration: how a field is declared, and the one place where its bounds are checked."""

import dataclasses
import functools
import re
import reprlib
import typing
from dataclasses import dataclass
from typing import Any

MAX_VALUES = 100  # of a list or mapping

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def setting(default: Any, within: str = "", *, free: bool = False) -> Any:
    """A field of a `Section`.

    Args:
        default: The default value.
        within: The interval of the number, or of each number of a list, such as "[0, 1)"; empty: no number.
        free: Whether the value may change when a run is resumed. Changing it does not change the course of the
            training: the images, their order, the views and the step sizes stay the same. If it changes how numbers are
            computed (a device, a ZeRO stage, parts of a batch, a compiler), the last bits of results may differ, and so
            may random numbers drawn by the model itself, such as those of dropout.
    """
    return dataclasses.field(default=default, metadata={"within": within, "free": free})


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base class of the sections: checks the bounds and the choices of every field.

    Raises:
        ValueError: A number is outside of its interval, a value is not one of a Literal's, or a list is too long; the
            message names the field.
    """

    def __post_init__(self) -> None:
        for name, choices, interval in _rules(type(self)):
            value = getattr(self, name)
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, not {shown(value)}")
            if isinstance(value, tuple | list | dict) and len(value) > MAX_VALUES:
                raise ValueError(f"{name} must hold at most {MAX_VALUES} values, not {len(value)}")
            for number in value if isinstance(value, tuple | list) else (value,):
                if interval and number is not None and not interval.holds(number):
                    raise ValueError(f"{name} must be in {interval.text}, not {shown(number)}")


def shown(value: Any) -> str:
    """A value as it is shown in a message: its repr, cut to a length that one reads."""
    return _repr.repr(value)


class _Interval:
    def __init__(self, text: str) -> None:
        left, low, high, right = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
        self.text, self.has_low, self.has_high = text, left == "[", right == "]"
        self.low, self.high = (int(end) if end.isdigit() else float(end) for end in (low, high))

    def holds(self, number: Any) -> bool:
        if not isinstance(number, int | float) or isinstance(number, bool):
            return False
        above = number >= self.low if self.has_low else number > self.low
        return above and (number <= self.high if self.has_high else number < self.high)


@functools.cache
def _rules(section: type) -> list[tuple[str, tuple[Any, ...], _Interval | None]]:
    """Name, choices and interval of each field."""
    hints = typing.get_type_hints(section)
    return [
        (
            item.name,
            typing.get_args(hints[item.name]) if typing.get_origin(hints[item.name]) is typing.Literal else (),
            _Interval(within) if (within := item.metadata.get("within")) else None,
        )
        for item in dataclasses.fields(section)
    ]
