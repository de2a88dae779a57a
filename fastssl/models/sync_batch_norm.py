"""Batch norm over the batches of all ranks, in any precision, on any backend.

# W ranks; C channels; n_r values per channel on rank r, n in total; mu_r, M_r a rank's mean and sum of (x - mu_r)^2
# x^ = (x - mu) / sqrt(v + eps); gamma, beta weight and bias; gy the gradient of y that a rank receives

    mu = sum n_r mu_r / n,   v = [sum M_r + sum n_r (mu_r - mu)^2] / n,   y = gamma x^ + beta

Chan, Golub and LeVeque 1979: avoids the cancellation of E[x^2] - E[x]^2. The forward pass gathers 2C + 1 numbers, the
backward pass sums 2C numbers. Statistics, their gradients and the normalisation are fp32 (fp64 for fp64 inputs)
whatever x's dtype is; x is the only tensor of its size kept for the backward pass.

    dL/dx = gamma / sqrt(v + eps) [gy - (1/n) sum gy - (x^/n) sum gy x^],   sums over all ranks

Gradients of gamma and beta are each rank's own sums: the engine averages them, like all other gradients. The engine
expects W dL/dy from each rank (docs/adr/0003-pair-sums-and-gradients-across-ranks.md); dL/dx is linear in gy, so with
sums over ranks, not means, each rank gets its W dL/dx.

torch.nn.SyncBatchNorm refuses CPU tensors. On the CPU, torch's plain batch norm computes E[x^2] - E[x]^2 for
channels-last fp32 tensors, so a single process also uses this code and matches several processes. On a GPU a single
process uses cuDNN's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastssl import collectives
from fastssl.machine.private_api import BatchNormBase


class SyncBatchNorm(BatchNormBase):
    """Batch norm with statistics over all ranks; torch's own in eval mode, and for a single process on a GPU.

    Ranks may have different numbers of images. Child modules, such as a timm layer's activation, are applied after it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """y [B, C, ...] in x's dtype and memory format; all ranks must call it, in the same order.

        Raises:
            ValueError: x has fewer than two dimensions, or only one value per channel in training mode.
        """
        is_own = self.training and (collectives.world_size() > 1 or x.device.type == "cpu")
        y = self._normalize(x) if is_own else super().forward(x)
        for after in self.children():
            y = after(y)
        return y

    def exclude_from_compilation(self) -> None:
        """Keep torch.compile from tracing the collectives.

        Not a decorator: it would import the compiler, two seconds, in processes that compile nothing.
        """
        self._normalize = torch.compiler.disable(self._normalize)  # pyright: ignore[reportAttributeAccessIssue]

    def _normalize(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if collectives.world_size() == 1 and x.numel() <= x.shape[1]:
            raise ValueError(f"batch norm needs more than one value per channel in training, got shape {list(x.shape)}")
        y, mean, variance, num_values = _Normalize.apply(x, self.weight, self.bias, self.eps)  # pyright: ignore[reportGeneralTypeIssues]
        self._track(mean, variance * (num_values / (num_values - 1)))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), rate)
        self.running_var.lerp_(unbiased_variance.to(self.running_var), rate)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm needs [B, C, ...], got shape {list(input.shape)}")


def exclude_from_compilation(module: nn.Module) -> None:
    """Keep torch.compile from tracing the collectives of the module's `SyncBatchNorm` layers."""
    for norm in module.modules():
        if isinstance(norm, SyncBatchNorm):
            norm.exclude_from_compilation()


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer computes statistics over the batch."""
    return any(isinstance(layer, BatchNormBase) for layer in module.modules())


def synchronize_batch_norms(module: nn.Module) -> None:
    """Convert every batch norm in the module to `SyncBatchNorm`, in place: parameters, buffers and names are kept.

    Raises:
        ValueError: A batch norm does more than normalise (and is not timm's, which adds an activation).
    """
    for norm in module.modules():
        if isinstance(norm, BatchNormBase) and not isinstance(norm, SyncBatchNorm):
            kind = type(norm)
            if kind.forward is not BatchNormBase.forward and kind.__name__ != "BatchNormAct2d":
                raise ValueError(
                    f"model.batch_norm=sync does not support {kind.__module__}.{kind.__name__}: set it to per_rank"
                )
            norm.__class__ = SyncBatchNorm


class _Normalize(torch.autograd.Function):
    """x, gamma, beta, eps -> y with gradient, and mu [C], v [C] (divided by n) and n without gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, num_values = _global_moments(x)
        inv_std = (variance + eps).rsqrt()
        y = _wide(x) - _along(mean, x)
        y *= _along(inv_std if weight is None else inv_std * weight, x)
        if bias is not None:
            y += _along(bias, x)
        ctx.save_for_backward(x, weight, mean, inv_std, num_values)
        ctx.mark_non_differentiable(mean, variance, num_values)
        return y.to(x.dtype), mean, variance, num_values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, inv_std, num_values = ctx.saved_tensors
        gy = _wide(gy)
        x_hat = (_wide(x) - _along(mean, x)).mul_(_along(inv_std, x))
        sum_gy, sum_gy_x_hat = gy.sum(_but_channels(x)), (gy * x_hat).sum(_but_channels(x))
        grad_weight = None if weight is None else sum_gy_x_hat.to(weight)
        grad_bias = sum_gy.to(weight) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None
        mean_gy, mean_gy_x_hat = collectives.EXCHANGE.sum_(torch.stack([sum_gy, sum_gy_x_hat])) / num_values
        grad_x = gy - _along(mean_gy, x) - x_hat.mul_(_along(mean_gy_x_hat, x))
        grad_x *= _along(inv_std if weight is None else inv_std * weight, x)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mu [C], v [C] and n (0-dim) over all ranks; bitwise equal on each rank."""
    num_channels, num_values = x.shape[1], x.numel() // x.shape[1]
    variance, mean = torch.var_mean(_wide(x), _but_channels(x), correction=0)
    own = torch.cat([mean, variance * num_values, mean.new_full((1,), num_values)])
    means, squares, counts = collectives.gather(own).split(
        [num_channels, num_channels, 1], dim=1
    )  # [W, C], [W, C], [W, 1]
    total = counts.sum()
    mean = means[0] + (counts * (means - means[0])).sum(0) / total  # differences, since means may be large
    squares = squares + counts * (means - mean).square()
    return mean, squares.sum(0) / total, total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Reshape [C] to [C, 1, ...], to broadcast over the channels of x."""
    return values.view(-1, *[1] * (x.ndim - 2))
