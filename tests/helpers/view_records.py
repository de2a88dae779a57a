"""Hand-written view parameters for tests of the pixel op."""

from typing import Any

import numpy as np

from kernels.augment.params import VIEW_PARAMS


def make_records(num: int = 1, **fields: Any) -> np.ndarray:
    """VIEW_PARAMS [num, 1] with the given fields; all other ops are off."""
    params = np.zeros((num, 1), VIEW_PARAMS)
    for name, value in fields.items():
        params[name] = value
    return params


def jitter(op: int, factor: float) -> dict[str, Any]:
    """The fields of a colour jitter with one op."""
    factors = np.array([1, 1, 1, 0], np.float32)
    factors[op] = factor
    return {"jitter": True, "jitter_order": [0, 1, 2, 3], "jitter_factor": factors}
