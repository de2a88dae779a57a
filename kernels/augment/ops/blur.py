"""Blur: torchvision's Gaussian blur with reflected borders."""

# u are uniform numbers in [0, 1)

from typing import Any

import numpy as np

from kernels.augment.ops.base import Field, Op, between, positive_range, probability


def reference(image: Any, record: Any, v2: Any) -> Any:
    """A kernel too large for reflect padding is reduced, as `augment` describes."""
    kernel_px = min(int(record["blur_kernel_px"]), 2 * min(image.shape[-2:]) - 1)
    return v2.gaussian_blur(image, [kernel_px] * 2, [float(record["blur_sigma"])] * 2)


BLUR = Op(
    name="blur",
    number=5,
    fields={
        "blur_p": probability(0.0),
        "blur_sigma": positive_range(0.1, 2.0),  # output pixels
        "blur_kernel_px": Field(23, "[1, 999]", lambda px: px % 2 == 1, "odd"),
    },
    params=(
        ("blur_sigma", np.float32),  # in output pixels; 0 = no blur
        ("blur_kernel_px", np.int32),  # odd kernel side in output pixels
    ),
    num_draws=1,  # sigma
    draw=lambda spec, u: {
        "blur_sigma": between(u[:, 0], spec.blur_sigma),
        "blur_kernel_px": spec.blur_kernel_px,
    },
    reference=reference,
)
