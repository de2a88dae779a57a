"""What losses over all pairs of the global batch share: unit rows, positives, and sums over negatives.

# B local batch, N global batch, D projection; a rank holds 2B rows u = [view a; view b], all ranks 2N
# s_ik = u_i . u_k;  p(i) the other view of row i;  Neg(i) every row but i and p(i): 2N - 2 of them
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastssl import dist
from kernels.pair_loss import MAX_EXP_INV_TEMPERATURE, Impl, Kind, pair_sums, pair_sums_grad


def unit_rows(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Normalised rows of both views, fp32 (fp64 for fp64 inputs), also under autocast.

    Args:
        z_a: Projections of view a [B, D], any floating dtype.
        z_b: Same for view b; row i is the positive of z_a[i].

    Returns:
        u [2B, D]: view a, then view b; differentiable.

    Raises:
        ValueError: Not 2-D, shapes or dtypes differ, no floating dtype, or fewer than two samples over all ranks.
    """
    if z_a.ndim != 2 or z_a.shape != z_b.shape:
        raise ValueError(f"z_a and z_b must both be [B, D], got {list(z_a.shape)} and {list(z_b.shape)}")
    if z_a.dtype != z_b.dtype or not z_a.is_floating_point():
        raise ValueError(f"z_a and z_b must have one floating dtype, got {z_a.dtype} and {z_b.dtype}")
    if len(z_a) * dist.world_size() < 2:
        raise ValueError(f"negatives need a global batch of at least 2 samples, got {len(z_a) * dist.world_size()}")
    # Cast before the concatenation: autocast promotes cat's inputs and knows its own low precision only.
    wide = torch.float64 if z_a.dtype == torch.float64 else torch.float32
    return F.normalize(torch.cat([z_a.to(wide), z_b.to(wide)]), dim=1)


def positive_similarities(u: Tensor) -> Tensor:
    """s_{i,p(i)} of the local pairs: [B], one for both rows of a pair."""
    u_a, u_b = u.chunk(2)
    return (u_a * u_b).sum(1)


def num_negatives(u: Tensor) -> int:
    """|Neg(i)| = 2N - 2."""
    return len(u) * dist.world_size() - 2


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact: F.softplus turns linear above 20."""
    return -F.logsigmoid(-x)


def symmetric_pair_sums(u: Tensor, *, kind: Kind, inv_temperature: float, impl: Impl = "auto") -> Tensor:
    """r_i = sum over k in Neg(i), from every rank, of f(s_ik): kernels/pair_loss/__init__.py lists f.

    The gradient in u is the complete one, pairs whose row is on another rank included, under an engine that averages
    parameter gradients. Ranks exchange u in forward and d loss/d r (2B numbers) in backward.

    Args:
        u: Local unit rows [2B, D], view a then view b; fp32 or fp64.
        kind: "exp" (shifted: e^{(s - 1)/tau}), "softplus" or "quadratic".
        inv_temperature: 1/tau, > 0.
        impl: See `kernels.pair_loss.pair_sums`.

    Returns:
        r [2B], dtype of u; once differentiable in u.
    """
    result: Tensor = _SymmetricPairSums.apply(u, kind, inv_temperature, impl)  # pyright: ignore[reportAssignmentType]
    return result


class _SymmetricPairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, kind: Kind, inv_temperature: float, impl: Impl) -> Tensor:
        columns = dist.gather_rows(u)
        ctx.save_for_backward(u, columns)
        ctx.term = {
            "kind": kind,
            "inv_temperature": inv_temperature,
            "row_offset": dist.rank() * len(u),
            "impl": impl,
        }
        return pair_sums(u, columns, **ctx.term)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        u, columns = ctx.saved_tensors
        return pair_sums_grad(u, columns, grad, dist.gather_rows(grad), **ctx.term), None, None, None


def check_temperature(field: str, temperature: float, *, of_exp: bool) -> None:
    """Refuse a temperature that is not a positive number, or at which e^{s/temperature} leaves fp32's range.

    Raises:
        ValueError: Names `field`, a dotted config key.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{field}: must be > 0, got {temperature}")
    lowest = 1 / MAX_EXP_INV_TEMPERATURE
    if of_exp and temperature < lowest:
        raise ValueError(f"{field}: must be >= {lowest:g}, got {temperature}; e^(s/temperature) leaves fp32's range")


def check_impl(impl: str) -> None:
    """Refuse an unknown `loss.impl` with a ValueError."""
    if impl not in ("auto", "chunked", "reference"):
        raise ValueError(f"loss.impl: must be auto, chunked or reference, got {impl!r}")
