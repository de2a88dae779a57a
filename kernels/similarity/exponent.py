"""Where e^{t s + b}, s in [-1, 1], is kept in the range of its number format."""

import math

import torch
from torch import Tensor

# With exp_shift every term is a normal fp32 number: e^{40 - 2 t} >= e^-80 = 1.8e-35, and sums end below 1e38.
MAX_EXP_INV_TEMPERATURE = 60.0

_HEADROOM = 40.0
_MAX_NARROW = 9.0  # e^{+-9} are normal numbers of fp16, which ends at 6.1e-5 and 65504


def scalar(x: float | Tensor, z: Tensor, *, name: str = "inv_temperature") -> Tensor:
    """x as a 0-dim tensor on z's device, fp64 for fp64 z, else fp32; a tensor keeps its graph.

    Raises:
        ValueError: A tensor of more or less than one element; `name` is in the text.
    """
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise ValueError(f"{name} must have one element, got {list(x.shape)}")
        return x.to(z.device, dtype).reshape(())
    return torch.full((), x, dtype=dtype, device=z.device)


def check_inv_temperature(inv_temperature: float | Tensor, *, of_exp: bool, name: str = "inv_temperature") -> None:
    """Refuse a number that is not > 0, or, for an exponential, at which e^{s t} leaves fp32; tensors are not looked at.

    Raises:
        ValueError: Says so; `name` is in the text.
    """
    if isinstance(inv_temperature, Tensor):
        return
    if not (math.isfinite(inv_temperature) and inv_temperature > 0):
        raise ValueError(f"{name} must be finite and > 0, got {inv_temperature}")
    if of_exp and inv_temperature > MAX_EXP_INV_TEMPERATURE:
        raise ValueError(f"{name} must be <= {MAX_EXP_INV_TEMPERATURE:g} for exp, got {inv_temperature}")


def check_bias(bias: float | Tensor) -> None:
    """Refuse a number that is not finite; tensors are not looked at.

    Raises:
        ValueError: Says so.
    """
    if not isinstance(bias, Tensor) and not math.isfinite(bias):
        raise ValueError(f"bias must be finite, got {bias}")


def exp_shift(inv_temperature: Tensor) -> Tensor:
    """A number b for sums of e^{t s + b} that neither overflow nor vanish in fp32, without a gradient: 40 - t.

    Sums of 10^7 terms stay below 3e24. A term is a normal number while t (1 - s) < 127: always up to t = 60. Beyond (a
    learned temperature) a row is right while that holds for its most similar negative, as terms far below the largest
    add nothing: at t = 100 above s = -.27. A row all of whose negatives are below that, as of one sample opposite to
    the rest, first loses digits, and by t (1 - s) = 144 its sum is 0, and its share of the gradient with it.
    """
    return _HEADROOM - inv_temperature.detach()


def is_narrow(inv_temperature: float | Tensor) -> bool:
    """Whether e^{t s} is known to fit fp16 as it is, so that it needs no shift."""
    return not isinstance(inv_temperature, Tensor) and inv_temperature <= _MAX_NARROW


def log_of_sum(sums: Tensor) -> Tensor:
    """log of a sum of positive terms that may have vanished all: finite."""
    return torch.log(sums.clamp_min(torch.finfo(sums.dtype).tiny))
