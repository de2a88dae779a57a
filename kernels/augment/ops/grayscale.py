"""Grayscale: torchvision's RandomGrayscale, with three equal channels."""

import numpy as np

from kernels.augment.ops.base import PointwiseOp, probability

_RED, _GREEN, _BLUE, _ONE = (np.float32(x) for x in (0.2989, 0.587, 0.114, 1))


def on_cpu(r, g, b):
    grey = min(_RED * r + _GREEN * g + _BLUE * b, _ONE)
    return grey, grey, grey


def on_gpu(r, g, b, _params):
    grey = 0.2989 * r + 0.587 * g + 0.114 * b
    return grey, grey, grey


GRAYSCALE = PointwiseOp(
    name="grayscale",
    number=4,
    fields={"grayscale_p": probability(0.2)},
    params=(("grayscale", np.bool_),),
    reference=lambda image, _record, v2: v2.rgb_to_grayscale(image, num_output_channels=3),
    on_cpu=on_cpu,
    on_gpu=on_gpu,
)
