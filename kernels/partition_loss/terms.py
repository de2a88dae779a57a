"""The log-sum-exp of each row over its negatives, in two passes; differentiable, also under torch.compile."""

# V views of B samples, D width; s, t as in kernels/similarity/__init__.py; Neg(i) as in kernels/pair_loss/terms.py
# r_i = sum_{k in Neg(i)} e^{t s_ik + b};  b: a shift that keeps r in fp32's range;  g_i = dL/dr_i

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.exchange import ALONE, Exchange
from kernels.pair_loss.terms import (
    Topology,
    accumulate_all,
    check_views,
    fake_terms,
    groups_of_rows,
    sum_over_pairs,
    total_of,
)
from kernels.similarity import Impl, Side, Term, choose_impl, load_impl
from kernels.similarity.exponent import exp_shift, log_of_sum


class PartitionTerms(NamedTuple):
    """Result of `partition_terms`.

    Attributes:
        positives: s of the positive pairs [V (V - 1) / 2, B], views v < w in lexical order; fp32, or fp64 for fp64 z.
        log_sums: log sum_{k in Neg(i)} e^{t s_ik} [V, B], same dtype; if the sum is 0, finite and far below the others.
        is_empty: Whether the sum is 0, as the row has no negatives (groups), [V, B], bool.
    """

    positives: Tensor
    log_sums: Tensor
    is_empty: Tensor


def partition_terms(
    z: Tensor,
    *,
    inv_temperature: Tensor,
    topology: Topology = "self",
    groups: Tensor | None = None,
    exchange: Exchange = ALONE,
    impl: Impl = "auto",
) -> PartitionTerms:
    """Similarities of the positive pairs, and the log-sum-exp over the negatives of each row.

    The gradient in z is complete, like that of `kernels.pair_loss.pair_terms`: ranks exchange the rows in the forward
    pass, and dL/dr, one number per row, in the backward pass.

    Args:
        z: Projections [V, B, D], V >= 2, any floating dtype; normalised inside. Differentiable.
        inv_temperature: t, 0-dim, > 0, on z's device; fp32, or fp64 for fp64 z. Differentiable.
        topology: "self": all rows against all rows. "cross": V = 2, the rows of each view against those of the other.
        groups: Integers [B]: samples with equal groups, on any rank, are not negatives of each other.
        exchange: The other ranks; their z has the same shape.
        impl: See `kernels.similarity`.

    Raises:
        ValueError: Shapes, dtypes or choices do not fit.
    """
    check_views(z, topology, groups, exchange.size)
    exchange.check_same_shape(z)
    shift = exp_shift(inv_temperature)
    impl = choose_impl(impl, z)
    inputs = (z, inv_temperature, shift, groups, topology, impl)
    if exchange.size > 1:
        positives, sums = _AcrossRanks.apply(exchange, *inputs)  # pyright: ignore
    elif impl == "reference":  # uses autograd, since the operators have only a first derivative
        positives, sums, _ = _forward(*inputs)
    else:
        positives, sums = _partition_terms(*inputs)
    return PartitionTerms(positives, log_of_sum(sums) - shift, sums.detach() == 0)


def _forward(
    z: Tensor,
    inv_temperature: Tensor,
    shift: Tensor,
    groups: Tensor | None,
    topology: str,
    impl: str,
    exchange: Exchange = ALONE,
) -> tuple[Tensor, Tensor, list[Side]]:
    """Return positives, r, and the columns of other ranks."""
    term = Term(kind="exp", inv_temperature=inv_temperature, bias=shift)
    unit, rows, others = sum_over_pairs(z, groups, term, topology, impl, exchange, with_grad=False)
    assert rows.sums is not None
    return unit.positives, rows.sums, others


def _backward(
    z: Tensor,
    inv_temperature: Tensor,
    shift: Tensor,
    groups: Tensor | None,
    positive_grads: Tensor,
    sum_grads: Tensor,
    topology: str,
    impl: str,
    others: Sequence[Side] = (),
    exchange: Exchange = ALONE,
) -> tuple[Tensor, Tensor]:
    """Return dz, dt. The pair (i, k) has weight g_i + g_k, since it is a term of both rows' sums."""
    term = Term(kind="exp", inv_temperature=inv_temperature, bias=shift)
    inv_norm, pulls = _pulls(z, groups, sum_grads.contiguous(), term, topology, impl, others, exchange)
    dz, dots = load_impl(impl).finish(z, inv_norm, pulls, inv_temperature, positive_grads)
    # `self`: in the sum over all rows, each pair's slope is counted twice.
    slope = total_of(dots, topology)
    return dz, slope / 2 if topology == "self" else slope


def _pulls(
    z: Tensor,
    groups: Tensor | None,
    weights: Tensor,
    term: Term,
    topology: str,
    impl: str,
    others: Sequence[Side],
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:
    """Return inv_norm [V, B] and pulls [V, B, D]. A separate function, so that u is freed before dz is computed."""
    implementation = load_impl(impl)
    u, inv_norm, _ = implementation.normalize(z, term.inv_temperature)  # recomputing from z is cheaper than keeping u
    pulls = inv_norm.new_zeros(z.shape)
    rows = Side(u=u, groups=groups_of_rows(groups, z), weights=weights, pulls=pulls)
    blocks = zip([rows, *others], exchange.blocks(weights), strict=True)
    columns = (Side(u=side.u, groups=side.groups, weights=g) for side, g in blocks)
    accumulate_all(implementation, rows, columns, term, topology)
    return inv_norm, pulls


_partition_terms = torch.library.custom_op(
    "fastssl::partition_terms",
    lambda *inputs: _forward(*inputs)[:2],
    mutates_args=(),
    schema="(Tensor z, Tensor inv_temperature, Tensor shift, Tensor? groups, str topology, str impl) "
    "-> (Tensor, Tensor)",
)


@_partition_terms.register_fake
def _(z, *_):
    positives, _, sums, _ = fake_terms(z, with_grad=False)
    return positives, sums


_partition_terms_backward = torch.library.custom_op(
    "fastssl::partition_terms_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor z, Tensor inv_temperature, Tensor shift, Tensor? groups, Tensor positive_grads, Tensor sum_grads, "
    "str topology, str impl) -> (Tensor, Tensor)",
)


@_partition_terms_backward.register_fake
def _(z, inv_temperature, *_):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(inv_temperature)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    del output
    ctx.save_for_backward(*inputs[:4])
    ctx.choices = inputs[4:]


def _backward_of_op(ctx: Any, positive_grads: Tensor, sum_grads: Tensor) -> tuple:
    grads = _partition_terms_backward(*ctx.saved_tensors, positive_grads, sum_grads, *ctx.choices)
    return *grads, *[None] * 4


_partition_terms.register_autograd(_backward_of_op, setup_context=_setup_context)


class _AcrossRanks(torch.autograd.Function):
    """The same for several ranks. Not a custom op, as the exchange is the caller's: torch.compile breaks the graph."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *inputs: Any) -> tuple[Tensor, Tensor]:
        positives, sums, others = _forward(*inputs, exchange=exchange)
        gathered = [x for side in others for x in (side.u, side.groups)]  # saved tensors: freed after the backward pass
        ctx.save_for_backward(*inputs[:4], *gathered)
        ctx.choices, ctx.exchange = inputs[4:], exchange
        return positives, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, positive_grads: Tensor, sum_grads: Tensor) -> tuple:  # pyright: ignore
        inputs, gathered = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        others = [Side(u=u, groups=groups) for u, groups in zip(gathered[::2], gathered[1::2], strict=True)]
        grads = _backward(*inputs, positive_grads, sum_grads, *ctx.choices, others, ctx.exchange)  # pyright: ignore
        return None, *grads, *[None] * 4
