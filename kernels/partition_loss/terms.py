"""The log-sum-exp of each row over its negatives, in two passes; differentiable, also under torch.compile."""

# V views of B samples, D width; s, t as in kernels/similarity/__init__.py; Neg(i) as in kernels/pair_loss/terms.py
# r_i = sum_{k in Neg(i)} e^{t s_ik + b};  b: a shift that keeps r in fp32's range;  g_i = dL/dr_i

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.exchange import ALONE, Exchange
from kernels.pair_loss.terms import (
    Topology,
    check_views,
    column_sides,
    counted_rows,
    groups_of_rows,
    meetings,
    sum_wide,
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
    choices = (topology, choose_impl(impl, z))
    if exchange.size == 1 and choices[1] == "reference":  # uses autograd, since the ops have only a first derivative
        positives, sums, _ = _forward(z, inv_temperature, shift, groups, *choices, exchange)
    elif exchange.size == 1:
        positives, sums = _partition_terms(z, inv_temperature, shift, groups, *choices)
    else:
        positives, sums = _AcrossRanks.apply(z, inv_temperature, shift, groups, choices, exchange)  # pyright: ignore
    return PartitionTerms(positives, log_of_sum(sums) - shift, sums.detach() == 0)


def _forward(
    z: Tensor,
    inv_temperature: Tensor,
    shift: Tensor,
    groups: Tensor | None,
    topology: str,
    impl: str,
    exchange: Exchange,
) -> tuple[Tensor, Tensor, list[Side]]:
    """Return positives, r, and the columns of other ranks."""
    implementation = load_impl(impl)  # pyright: ignore[reportArgumentType]
    u, inv_norm, positives = implementation.normalize(z, inv_temperature)
    rows = Side(u=u, groups=groups_of_rows(groups, z), sums=0 * inv_norm)  # as in pair_loss/terms.py
    assert rows.sums is not None
    seen: list[Side] = []
    for side, columns, own in meetings(rows, _kept(column_sides(exchange, rows), seen), topology):
        implementation.accumulate(side, columns, _term(inv_temperature, shift), own)
    return positives, rows.sums, seen[1:]


def _kept(sides: Any, kept: list[Side]) -> Any:
    for side in sides:
        kept.append(side)
        yield side


def _term(inv_temperature: Tensor, shift: Tensor) -> Term:
    return Term(kind="exp", inv_temperature=inv_temperature, bias=shift)


def _backward(
    z: Tensor,
    inv_temperature: Tensor,
    shift: Tensor,
    groups: Tensor | None,
    positive_grads: Tensor,
    sum_grads: Tensor,
    topology: str,
    impl: str,
    others: list[Side],
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:
    """Return dz, dt. The pair (i, k) has weight g_i + g_k, since it is a term of both rows' sums."""
    inv_norm, pulls = _pulls(z, inv_temperature, shift, groups, sum_grads, topology, impl, others, exchange)
    implementation = load_impl(impl)  # pyright: ignore[reportArgumentType]
    dz, dots = implementation.finish(z, inv_norm, pulls, inv_temperature, positive_grads)
    assert dots is not None
    # `self`: in the sum over all rows, each pair's slope is counted twice.
    slope = sum_wide(counted_rows(dots, topology))
    return dz, slope / 2 if topology == "self" else slope


def _pulls(
    z: Tensor,
    inv_temperature: Tensor,
    shift: Tensor,
    groups: Tensor | None,
    sum_grads: Tensor,
    topology: str,
    impl: str,
    others: list[Side],
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:
    """Return inv_norm [V, B] and pulls [V, B, D]. A separate function, so that u is freed before dz is computed."""
    implementation = load_impl(impl)  # pyright: ignore[reportArgumentType]
    u, inv_norm, _ = implementation.normalize(z, inv_temperature)  # recomputing from z is cheaper than keeping u
    rows = Side(
        u=u,
        groups=groups_of_rows(groups, z),
        weights=sum_grads.contiguous(),
        pulls=inv_norm.new_zeros(z.shape),
    )
    assert rows.weights is not None
    assert rows.pulls is not None
    weights = exchange.blocks(rows.weights)
    columns = (Side(u=s.u, groups=s.groups, weights=g) for s, g in zip([rows, *others], weights, strict=True))
    for side, other, own in meetings(rows, columns, topology):
        implementation.accumulate(side, other, _term(inv_temperature, shift), own)
    return inv_norm, rows.pulls


@torch.library.custom_op("fastssl::partition_terms", mutates_args=())
def _partition_terms(
    z: Tensor, inv_temperature: Tensor, shift: Tensor, groups: Tensor | None, topology: str, impl: str
) -> tuple[Tensor, Tensor]:
    positives, sums, _ = _forward(z, inv_temperature, shift, groups, topology, impl, ALONE)
    return positives, sums


@_partition_terms.register_fake
def _(z, inv_temperature, shift, groups, topology, impl):
    num_views, num_samples, _ = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return (
        z.new_empty((num_views * (num_views - 1) // 2, num_samples), dtype=dtype),
        z.new_empty((num_views, num_samples), dtype=dtype),
    )


@torch.library.custom_op("fastssl::partition_terms_backward", mutates_args=())
def _partition_terms_backward(
    z: Tensor,
    inv_temperature: Tensor,
    shift: Tensor,
    groups: Tensor | None,
    positive_grads: Tensor,
    sum_grads: Tensor,
    topology: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _backward(z, inv_temperature, shift, groups, positive_grads, sum_grads, topology, impl, [], ALONE)


@_partition_terms_backward.register_fake
def _(z, inv_temperature, shift, groups, positive_grads, sum_grads, topology, impl):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(inv_temperature)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    del output
    *tensors, topology, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.choices = (topology, impl)


def _backward_of_op(ctx: Any, positive_grads: Tensor, sum_grads: Tensor) -> tuple:
    dz, dt = _partition_terms_backward(*ctx.saved_tensors, positive_grads, sum_grads, *ctx.choices)
    return dz, dt, *[None] * 4


_partition_terms.register_autograd(_backward_of_op, setup_context=_setup_context)


class _AcrossRanks(torch.autograd.Function):
    """The same for several ranks. Not a custom op, as the exchange is the caller's: torch.compile breaks the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        inv_temperature: Tensor,
        shift: Tensor,
        groups: Tensor | None,
        choices: tuple[str, str],
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor]:
        positives, sums, others = _forward(z, inv_temperature, shift, groups, *choices, exchange)  # pyright: ignore
        gathered = [x for side in others for x in (side.u, side.groups)]  # saved tensors: freed after the backward pass
        ctx.save_for_backward(z, inv_temperature, shift, groups, *gathered)
        ctx.choices, ctx.exchange = choices, exchange
        return positives, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, positive_grads: Tensor, sum_grads: Tensor) -> tuple:  # pyright: ignore
        inputs, gathered = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        others = [Side(u=u, groups=groups) for u, groups in zip(gathered[::2], gathered[1::2], strict=True)]
        dz, dt = _backward(*inputs, positive_grads, sum_grads, *ctx.choices, others, ctx.exchange)  # pyright: ignore
        return dz, dt, *[None] * 4
