"""The contract of an op: one augmentation, how it is configured, drawn and applied.

An op's file is imported with every configuration: it imports neither numba, Triton nor torch at its top.
"""

# B samples, H and W height and width in pixels

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Field:
    """A configuration field of a view.

    Attributes:
        default: The default, which has the field's type; a pair is low <= high.
        within: The interval of its numbers, such as "[0, 1)"; empty for a bool.
        holds: A further rule for its values.
        rule: That rule, as the end of the message "... must be".
    """

    default: bool | int | float | tuple[float, float]
    within: str = ""
    holds: Callable[[Any], bool] = lambda _: True
    rule: str = ""


def probability(default: float) -> Field:
    """The field `<op>_p`: the probability that a view has the op."""
    return Field(default, "[0, 1]")


def positive_range(low: float, high: float) -> Field:
    """A field from which a number is drawn: low and high, > 0."""
    return Field((low, high), "[1e-3, 1e3]")


def between(u: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Numbers u in [0, 1), mapped to [low, high)."""
    return limits[0] + u * (limits[1] - limits[0])


@dataclass(frozen=True, kw_only=True)
class Op:
    """An augmentation.

    Attributes:
        name: Lower case; `fields` has its probability, `<name>_p`.
        number: Its number in the counter of the random numbers, in [0, 256); never reused or changed
            (docs/adr/0002-counter-based-draw.md).
        fields: Its configuration fields in a view.
        params: Its fields in VIEW_PARAMS, as numpy's dtype takes them. The first, the gate, is zero in views without
            the op; unless `draw` returns it, it is bool and has the op's name.
        num_draws: Number of uniform numbers per view that `draw` gets.
        draw: (ViewSpec, u float64 [B, num_draws] in [0, 1)) -> values of params, each [B, ...] or one for all samples.
            Samples without the op are then set to zero.
        reference: (image fp32 [3, H, W] in [0, 1], record of VIEW_PARAMS, torchvision's v2.functional) -> image.
    """

    name: str
    number: int
    fields: Mapping[str, Field]
    params: tuple[tuple[Any, ...], ...]
    num_draws: int = 0
    draw: Callable[[Any, np.ndarray], dict[str, Any]] = lambda _spec, _u: {}
    reference: Callable[[Any, Any, Any], Any]

    @property
    def gate(self) -> str:
        """Name of the param that tells whether a view has the op."""
        return self.params[0][0]


@dataclass(frozen=True, kw_only=True)
class PointwiseOp(Op):
    """An op whose output pixel depends only on the same input pixel; the params after the gate are scalars.

    Attributes:
        on_cpu: (r, g, b, *params after the gate) -> r, g, b, fp32 scalars; compiled by numba into the loop over pixels.
            Its constants are np.float32 of the module: a Python float would make the arithmetic float64.
        on_gpu: (r, g, b, params) -> r, g, b, fp32 blocks; compiled by Triton. `tl.load(params + i)` is param i after
            the gate, as fp32. `tl` needs no import; other names of the module are not available.
    """

    on_cpu: Callable[..., Any]
    on_gpu: Callable[..., Any]
