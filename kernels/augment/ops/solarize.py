"""Solarize: torchvision's RandomSolarize; inverts values at or above a threshold."""

from typing import TYPE_CHECKING

import numpy as np

from kernels.augment.ops.base import Field, PointwiseOp, probability

if TYPE_CHECKING:
    from triton import language as tl

_ONE = np.float32(1)


def on_cpu(r, g, b, threshold):
    r = _ONE - r if r >= threshold else r
    g = _ONE - g if g >= threshold else g
    b = _ONE - b if b >= threshold else b
    return r, g, b


def on_gpu(r, g, b, params):
    threshold = tl.load(params)
    r = tl.where(r >= threshold, 1.0 - r, r)
    g = tl.where(g >= threshold, 1.0 - g, g)
    b = tl.where(b >= threshold, 1.0 - b, b)
    return r, g, b


SOLARIZE = PointwiseOp(
    name="solarize",
    number=6,
    fields={
        "solarize_p": probability(0.0),
        "solarize_threshold": Field(0.5, "[0, 1]"),
    },
    params=(("solarize", np.bool_), ("solarize_threshold", np.float32)),
    draw=lambda spec, _u: {"solarize_threshold": spec.solarize_threshold},
    reference=lambda image, record, v2: v2.solarize(image, float(record["solarize_threshold"])),
    on_cpu=on_cpu,
    on_gpu=on_gpu,
)
