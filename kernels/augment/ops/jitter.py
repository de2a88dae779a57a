"""Jitter: torchvision's ColorJitter; its four parts are applied in a uniformly drawn order."""

# B samples; u are uniform numbers in [0, 1)

import itertools
from typing import Any

import numpy as np

from kernels.augment.ops.base import Field, Op, between, probability

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3  # part codes
_ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), np.uint8)


def draw(spec: Any, u: np.ndarray) -> dict[str, Any]:
    """The order and the factors, by part code; u [B, 5]. A part of strength zero has exactly the neutral factor."""
    factors = np.empty((len(u), 4))
    for part, strength in ((BRIGHTNESS, spec.brightness), (CONTRAST, spec.contrast), (SATURATION, spec.saturation)):
        factors[:, part] = between(u[:, 1 + part], (max(0.0, 1 - strength), 1 + strength))
    factors[:, HUE] = between(u[:, 1 + HUE], (-spec.hue, spec.hue))
    return {"jitter_order": _ORDERS[(u[:, 0] * len(_ORDERS)).astype(np.int64)], "jitter_factor": factors}


def reference(image: Any, record: Any, v2: Any) -> Any:
    """Parts with the neutral factor are skipped, as in torchvision."""
    adjust = {
        BRIGHTNESS: v2.adjust_brightness,
        CONTRAST: v2.adjust_contrast,
        SATURATION: v2.adjust_saturation,
        HUE: v2.adjust_hue,
    }
    for part in record["jitter_order"].tolist():
        factor = float(record["jitter_factor"][part])
        if factor != (0.0 if part == HUE else 1.0):
            image = adjust[part](image, factor)
    return image


JITTER = Op(
    name="jitter",
    number=3,
    fields={
        "jitter_p": probability(0.8),
        "brightness": Field(0.4, "[0, 100]"),
        "contrast": Field(0.4, "[0, 100]"),
        "saturation": Field(0.4, "[0, 100]"),
        "hue": Field(0.1, "[0, 0.5]"),  # turns
    },
    params=(
        ("jitter", np.bool_),
        ("jitter_order", np.uint8, (4,)),  # a permutation of the part codes
        # by part code: brightness, contrast, saturation (1 = unchanged), hue shift in turns [-.5, .5]
        ("jitter_factor", np.float32, (4,)),
    ),
    num_draws=5,  # order (of the 24 permutations, lexicographic), brightness, contrast, saturation, hue
    draw=draw,
    reference=reference,
)
