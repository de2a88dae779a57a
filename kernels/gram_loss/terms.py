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
from kernels.pair_loss.terms import PairTerms, Topology, check_views, fake_terms, given_grads, total_of
from kernels.similarity import Impl, choose_impl
from kernels.similarity.rows import add_positives, finish, normalize, view_pairs, widen


class GramImplementation(Protocol):
    """The interface of an implementation module."""

    def add_rows(
        self, x: Tensor, view: int, own: list[int], first: Tensor, second: Tensor, c1: float, c2: float,
        pulls: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return sum_{k in Neg(i)} f(s_ik) [B] of one view's rows; write sum_{k in Neg(i)} f'(s_ik) x_k to `pulls`.

        Args:
            x: The rows of this rank [V, B, D], fp32 or fp64, contiguous.
            view: The view whose rows are used.
            own: Views whose rows are included in the moments.
            first: m [D].
            second: M [D, D].
            c1: Factor of s in f.
            c2: Factor of s^2.
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
    impl = choose_impl(impl, z)
    uses_autograd = impl == "reference" and exchange.size == 1  # the operators have only a first derivative
    with_grad = torch.is_grad_enabled() and z.requires_grad and not uses_autograd
    inputs = (z, float(linear), float(square), unit, topology, impl, with_grad)
    if exchange.size > 1:
        positives, total, *_ = _AcrossRanks.apply(*inputs, exchange)  # pyright: ignore
    else:
        positives, total, *_ = _forward(*inputs) if uses_autograd else _gram_terms(*inputs)
    return PairTerms(positives, total)


def _forward(
    z: Tensor, c1: float, c2: float, unit: bool, topology: str, impl: str, with_grad: bool, exchange: Exchange = ALONE
) -> tuple[Tensor, ...]:
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
            sums[v] = implementation.add_rows(x, v, others, moment, second_moment, c1, c2, view_pulls)
    return positives, total_of(sums, topology), inv_norm, pulls


def _rows(z: Tensor, unit: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, inv_norm, positives."""
    if unit:
        return normalize(z, z.new_empty(()))
    x = widen(z).contiguous()
    return x, x.new_ones(x.shape[:2]), torch.stack([(x[v] * x[w]).sum(1) for v, w in view_pairs(len(x))])


_gram_terms = torch.library.custom_op(
    "fastssl::gram_terms",
    _forward,
    mutates_args=(),
    schema="(Tensor z, float c1, float c2, bool unit, str topology, str impl, bool with_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@_gram_terms.register_fake
def _(z, *settings):
    return fake_terms(z, with_grad=settings[-1])


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
    pull_scale = total_grad * 2 if topology == "self" else total_grad
    if unit:
        return finish(z, inv_norm, pulls, pull_scale, positive_grads)[0]
    dx = pulls * pull_scale
    add_positives(dx, widen(z), positive_grads)
    return dx.to(z.dtype)


@_gram_terms_backward.register_fake
def _(z, *_):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, _, _, unit, topology, *_ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # avoids zeros of the size of the pulls, which are not used
    ctx.save_for_backward(z, *output[2:])
    ctx.choices = (unit, topology)


def _backward(ctx: Any, positive_grads: Tensor | None, total_grad: Tensor | None, *_: Any) -> tuple:
    given = given_grads(positive_grads, total_grad, ctx.saved_tensors[1])
    return _gram_terms_backward(*ctx.saved_tensors, *given, *ctx.choices), *[None] * (len(ctx.needs_input_grad) - 1)


_gram_terms.register_autograd(_backward, setup_context=_setup_context)


class _AcrossRanks(torch.autograd.Function):
    """The same for several ranks. Not a custom op, as the exchange is the caller's: torch.compile breaks the graph."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))  # pyright: ignore[reportAssignmentType]
