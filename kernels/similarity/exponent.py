"""Keeps e^{t s + b}, s in [-1, 1], within the range of its number format."""

import math

import torch
from torch import Tensor

from kernels.similarity.rows import wide_dtype

# With exp_shift every term is a normal fp32 number: e^{40 - 2 t} >= e^-80 = 1.8e-35, and sums stay below 1e38.
MAX_EXP_INV_TEMPERATURE = 60.0

_HEADROOM = 40.0
_MAX_NARROW = 9.0  # e^{+-9} are normal numbers of fp16, whose range is 6.1e-5 to 65504


def scalar(x: float | Tensor, z: Tensor, *, name: str = "inv_temperature") -> Tensor:
    """Convert x to a 0-dim tensor on z's device, fp64 for fp64 z, else fp32; a tensor keeps its autograd graph.

    Raises:
        ValueError: A tensor that does not have exactly one element; the message contains `name`.
    """
    dtype = wide_dtype(z)
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise ValueError(f"{name} must have one element, got {list(x.shape)}")
        return x.to(z.device, dtype).reshape(())
    return torch.full((), x, dtype=dtype, device=z.device)


def check_inv_temperature(inv_temperature: float | Tensor, *, of_exp: bool, name: str = "inv_temperature") -> None:
    """Check that a number is > 0 and, for an exponential, that e^{s t} is within fp32's range; tensors are not checked.

    Raises:
        ValueError: The check failed; the message contains `name`.
    """
    if isinstance(inv_temperature, Tensor):
        return
    if not (math.isfinite(inv_temperature) and inv_temperature > 0):
        raise ValueError(f"{name} must be finite and > 0, got {inv_temperature}")
    if of_exp and inv_temperature > MAX_EXP_INV_TEMPERATURE:
        raise ValueError(f"{name} must be <= {MAX_EXP_INV_TEMPERATURE:g} for exp, got {inv_temperature}")


def check_bias(bias: float | Tensor) -> None:
    """Check that a number is finite; tensors are not checked.

    Raises:
        ValueError: It is not finite.
    """
    if not isinstance(bias, Tensor) and not math.isfinite(bias):
        raise ValueError(f"bias must be finite, got {bias}")


def exp_shift(inv_temperature: Tensor) -> Tensor:
    """The shift b = 40 - t, without gradient, for which sums of e^{t s + b} neither overflow nor vanish in fp32.

    Sums of 10^7 terms stay below 3e24. A term is a normal number if t (1 - s) < 127, which always holds up to t = 60.
    For larger t (a learned temperature), a row's sum is accurate if this holds for its most similar negative, since
    terms far below the largest add nothing: at t = 100, for s above -.27. If all negatives of a row are below that
    (for example, one sample opposite to all others), its sum first loses precision. From t (1 - s) = 144 on, the sum
    is 0, and so is its contribution to the gradient.
    """
    return _HEADROOM - inv_temperature.detach()


def is_narrow(inv_temperature: float | Tensor) -> bool:
    """Whether e^{t s} is known to fit fp16 without a shift."""
    return not isinstance(inv_temperature, Tensor) and inv_temperature <= _MAX_NARROW


def log_of_sum(sums: Tensor) -> Tensor:
    """log of a sum of positive terms; finite even if all terms have underflowed to zero."""
    return torch.log(sums.clamp_min(torch.finfo(sums.dtype).tiny))
