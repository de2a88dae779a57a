"""Sums over pairs of a polynomial of the similarity, from D x D moments, without forming the pairs.

# V views of B samples on this rank, N samples over all ranks, D width; rows x_i, normalised or not; s_ik = x_i . x_k
# f(s) = c1 s + c2 s^2;  C(i) the rows that row i is compared with, including its own sample's; Neg(i) excludes those
# first moment m = sum_{k in C} x_k [D], second moment M = sum_{k in C} x_k x_k^T [D, D]

    sum_{k in C} f(s_ik)      = c1 x_i . m + c2 x_i . M x_i
    sum_{k in C} f'(s_ik) x_k = c1 m + 2 c2 M x_i

The sum over Neg(i) is the sum over C(i) minus the V (`cross`: one) rows of the sample itself. This takes O(N D^2)
operations and O(N D) memory; ranks exchange only the moments. HaoChen et al. 2021, arXiv:2106.04156, write the spectral
loss in this form; the exact form for any such f is derived here and tested against the sum over pairs.
"""

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.exchange import ALONE, Exchange
from kernels.pair_loss.terms import PairTerms, Topology, check_views, counted_rows, given_grads, sum_wide
from kernels.similarity import Impl, choose_impl
from kernels.similarity.rows import finish, normalize, view_pairs, widen


class GramImplementation(Protocol):
    """The interface of an implementation module."""

    def add_rows(
        self,
        x: Tensor,
        view: int,
        own: list[int],
        first: Tensor,
        second: Tensor,
        linear: float,
        square: float,
        pulls: Tensor | None,
    ) -> Tensor:
        """Return sum_{k in Neg(i)} f(s_ik) [B] of one view's rows; write sum_{k in Neg(i)} f'(s_ik) x_k to `pulls`.

        Args:
            x: The rows of this rank [V, B, D], fp32 or fp64, contiguous.
            view: The view whose rows are used.
            own: Views whose rows are included in the moments.
            first: m [D].
            second: M [D, D].
            linear: c1.
            square: c2.
            pulls: [B, D], contiguous, overwritten; None: not computed.
        """
        ...


def gram_terms(
    z: Tensor,
    *,
    linear: float,
    square: float,
    unit: bool = True,
    topology: Topology = "self",
    exchange: Exchange = ALONE,
    impl: Impl = "auto",
) -> PairTerms:
    """Similarities of the positive pairs, and the sum of c1 s + c2 s^2 over the negative pairs.

    Like `kernels.pair_loss.pair_terms`, with the same complete gradient, in O(N D^2).

    Args:
        z: Projections [V, B, D], V >= 2, any floating dtype. Differentiable.
        linear: c1.
        square: c2.
        unit: Whether the rows are normalised first.
        topology: See `pair_terms`.
        exchange: The other ranks; their z has the same shape.
        impl: "chunked" uses torch's products; "reference", the same equations without in-place operations; "fused"
            computes the sums and the gradient of a row in one kernel (TF32 products).

    Raises:
        ValueError: Shapes, dtypes or choices do not fit.
    """
    check_views(z, topology, None, exchange.size)
    exchange.check_same_shape(z)
    with_grad = torch.is_grad_enabled() and z.requires_grad
    impl = choose_impl(impl, z)
    settings = (float(linear), float(square), unit, topology, impl, with_grad)
    if exchange.size == 1 and impl == "reference":  # uses autograd, since the op has only a first derivative
        positives, total, *_ = _forward(z, *settings[:-1], with_grad=False, exchange=exchange)
    elif exchange.size == 1:
        positives, total, *_ = _gram_terms(z, *settings)
    else:
        positives, total = _AcrossRanks.apply(z, settings, exchange)  # pyright: ignore
    return PairTerms(positives, total)


def _forward(
    z: Tensor,
    linear: float,
    square: float,
    unit: bool,
    topology: str,
    impl: str,
    with_grad: bool,
    exchange: Exchange,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return positives, total, inv_norm [V, B] (ones without `unit`), pulls [V, B, D] (empty without gradient)."""
    implementation: GramImplementation = importlib.import_module(f"kernels.gram_loss.{impl}")  # pyright: ignore
    with torch.autocast(z.device.type, enabled=False):
        x, inv_norm, positives = _rows(z, unit)
        first = exchange.sum_(x.sum(1))
        second = exchange.sum_(x.mT @ x)
        sums, pulls = torch.empty_like(inv_norm), torch.empty_like(x) if with_grad else x.new_empty(0)
        for v in range(len(x)):
            others = list(range(len(x))) if topology == "self" else [1 - v]
            moment, second_moment = (m.sum(0) if topology == "self" else m[1 - v] for m in (first, second))
            view_pulls = pulls[v] if with_grad else None
            sums[v] = implementation.add_rows(x, v, others, moment, second_moment, linear, square, view_pulls)
    total = sum_wide(counted_rows(sums, topology))
    return positives, total, inv_norm, pulls


def _rows(z: Tensor, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, inv_norm, positives."""
    if unit:
        return normalize(z, z.new_empty(()))
    x = widen(z).contiguous()
    return x, x.new_ones(x.shape[:2]), torch.stack([(x[v] * x[w]).sum(1) for v, w in view_pairs(len(x))])


def _backward(
    z: Tensor,
    inv_norm: Tensor,
    pulls: Tensor,
    positive_grads: Tensor,
    total_grad: Tensor,
    unit: bool,
    topology: str,
) -> Tensor:
    pull_scale = total_grad * 2 if topology == "self" else total_grad
    if unit:
        return finish(z, inv_norm, pulls, pull_scale, positive_grads)[0]
    x, dx = widen(z), pulls * pull_scale
    for (v, w), grads in zip(view_pairs(len(z)), positive_grads, strict=True):
        dx[v].addcmul_(grads[:, None], x[w])
        dx[w].addcmul_(grads[:, None], x[v])
    return dx.to(z.dtype)


@torch.library.custom_op("fastssl::gram_terms", mutates_args=())
def _gram_terms(
    z: Tensor, linear: float, square: float, unit: bool, topology: str, impl: str, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(z, linear, square, unit, topology, impl, with_grad, ALONE)


@_gram_terms.register_fake
def _(z, linear, square, unit, topology, impl, with_grad):
    num_views, num_samples, width = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty((num_views * (num_views - 1) // 2, num_samples), dtype=dtype),
        z.new_empty((), dtype=dtype),
        z.new_empty((num_views, num_samples), dtype=dtype),
        z.new_empty((num_views, num_samples, width) if with_grad else (0,), dtype=dtype),
    )


@torch.library.custom_op("fastssl::gram_terms_backward", mutates_args=())
def _gram_terms_backward(
    z: Tensor,
    inv_norm: Tensor,
    pulls: Tensor,
    positive_grads: Tensor,
    total_grad: Tensor,
    unit: bool,
    topology: str,
) -> Tensor:
    return _backward(z, inv_norm, pulls, positive_grads, total_grad, unit, topology)


@_gram_terms_backward.register_fake
def _(z, inv_norm, pulls, positive_grads, total_grad, unit, topology):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, _, _, unit, topology, _, _ = inputs
    _, _, inv_norm, pulls = output
    ctx.mark_non_differentiable(inv_norm, pulls)
    ctx.set_materialize_grads(False)  # avoids zeros of the size of the pulls, which are not used
    ctx.save_for_backward(z, inv_norm, pulls)
    ctx.choices = (unit, topology)


def _backward_of_op(ctx: Any, positive_grads: Tensor | None, total_grad: Tensor | None, *_: Any) -> tuple:
    z, inv_norm, pulls = ctx.saved_tensors
    given = given_grads(positive_grads, total_grad, inv_norm)
    return _gram_terms_backward(z, inv_norm, pulls, *given, *ctx.choices), *[None] * 6


_gram_terms.register_autograd(_backward_of_op, setup_context=_setup_context)


class _AcrossRanks(torch.autograd.Function):
    """The same for several ranks. Not a custom op, as the exchange is the caller's: torch.compile breaks the graph."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, settings: tuple, exchange: Exchange) -> tuple[Tensor, Tensor]:
        positives, total, *saved = _forward(z, *settings, exchange)  # pyright: ignore
        ctx.save_for_backward(z, *saved)
        ctx.choices = settings[2:4]
        return positives, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, positive_grads: Tensor, total_grad: Tensor) -> tuple:  # pyright: ignore
        return _backward(*ctx.saved_tensors, positive_grads, total_grad, *ctx.choices), None, None  # pyright: ignore
