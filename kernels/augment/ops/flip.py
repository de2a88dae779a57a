"""Flip: horizontal."""

import numpy as np

from kernels.augment.ops.base import Op, probability

FLIP = Op(
    name="flip",
    number=2,
    fields={"flip_p": probability(0.5)},
    params=(("flip", np.bool_),),
    reference=lambda image, _record, v2: v2.horizontal_flip(image),
)
