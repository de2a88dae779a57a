"""The two sums of a loss over pairs, in one pass; differentiable, also under torch.compile."""

# V views of B samples, D width, W ranks; s, t, b, f, slopes and pulls as in kernels/similarity/__init__.py
# m = V B rows on this rank; Neg(i): the columns that row i is compared with, except those of its own sample or group

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.exchange import ALONE, Exchange
from kernels.similarity import Impl, Implementation, Kind, Rows, Side, Term, choose_impl, load_impl
from kernels.similarity.rows import wide_dtype

Topology = Literal["self", "cross"]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TOPOLOGIES: tuple[str, ...] = get_args(Topology)


class PairTerms(NamedTuple):
    """Result of `pair_terms`.

    Attributes:
        positives: s of the positive pairs [V (V - 1) / 2, B], views v < w in lexical order; fp32, or fp64 for fp64 z.
        total: Sum over the local rows i (`cross`: of view 0) and k in Neg(i) of f(t s_ik + b); 0-dim, same dtype.
    """

    positives: Tensor
    total: Tensor


def pair_terms(
    z: Tensor,
    *,
    kind: Kind,
    inv_temperature: Tensor,
    bias: Tensor,
    wide_range: bool = True,
    topology: Topology = "self",
    groups: Tensor | None = None,
    exchange: Exchange = ALONE,
    impl: Impl = "auto",
) -> PairTerms:
    """Similarities of the positive pairs, and the sum of f over the negative pairs.

    The gradient in z is complete: it includes pairs whose row is on another rank. This is correct for a trainer that
    AVERAGES parameter gradients when each rank's loss is a mean over its own rows. The gradient is computed in the same
    pass over the pairs as the value; if no gradient is needed, it is skipped.

    Args:
        z: Projections [V, B, D], V >= 2, any floating dtype; normalised inside. Differentiable.
        kind: f.
        inv_temperature: t, 0-dim, > 0, on z's device; fp32, or fp64 for fp64 z. Differentiable.
        bias: b, likewise.
        wide_range: See `kernels.similarity.Term`.
        topology: "self": all rows against all rows. "cross": V = 2, rows of view 0 against those of view 1.
        groups: Integers [B]: samples with equal groups, on any rank, are not negatives of each other.
        exchange: The other ranks; their z has the same shape.
        impl: See `kernels.similarity`.

    Raises:
        ValueError: Shapes, dtypes or choices do not fit.
    """
    check_views(z, topology, groups, exchange.size)
    exchange.check_same_shape(z)
    impl = choose_impl(impl, z)
    uses_autograd = impl == "reference" and exchange.size == 1  # the operators have only a first derivative
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (z, inv_temperature, bias))
    with_grad = needs_grad and not uses_autograd
    with_scale_grad = with_grad and (inv_temperature.requires_grad or bias.requires_grad)
    inputs = (z, inv_temperature, bias, groups, kind, topology, impl, wide_range, with_grad, with_scale_grad)
    if exchange.size > 1:
        positives, total, *_ = _AcrossRanks.apply(*inputs, exchange)  # pyright: ignore
    else:
        positives, total, *_ = _forward(*inputs) if uses_autograd else _pair_terms(*inputs)
    return PairTerms(positives, total)


def check_views(z: Tensor, topology: str, groups: Tensor | None, num_ranks: int) -> None:
    """Check the inputs of a loss over pairs.

    Raises:
        ValueError: See `pair_terms`.
    """
    if z.ndim != 3 or not z.is_floating_point() or 0 in z.shape:
        raise ValueError(f"z must be [views, samples, width] of a floating dtype, got {list(z.shape)} of {z.dtype}")
    if topology not in TOPOLOGIES:
        raise ValueError(f"topology must be one of {', '.join(TOPOLOGIES)}, got {topology!r}")
    if len(z) < 2 or (topology == "cross" and len(z) != 2):
        wanted = "two" if topology == "cross" else "at least two"
        raise ValueError(f"topology {topology} needs {wanted} views, got {len(z)}")
    if z.shape[1] * num_ranks < 2:
        raise ValueError(f"z must have at least two samples over all ranks, got {z.shape[1]} on {num_ranks} rank")
    if groups is None:
        return
    if groups.shape != z.shape[1:2] or groups.dtype not in INTEGERS:
        raise ValueError(f"groups must be integers {list(z.shape[1:2])}, got {list(groups.shape)} of {groups.dtype}")
    if groups.device != z.device:
        raise ValueError(f"groups must be on the device of z, {z.device}, got {groups.device}")


def sum_over_pairs(
    z: Tensor, groups: Tensor | None, term: Term, topology: str, impl: str, exchange: Exchange, with_grad: bool
) -> tuple[Rows, Side, list[Side]]:
    """Return the normalised rows, their accumulators (slopes and pulls `with_grad`), and the columns of other ranks."""
    implementation = load_impl(impl)
    unit = implementation.normalize(z, term.inv_temperature)
    rows = Side(u=unit.u, groups=groups_of_rows(groups, z))
    rows.sums = 0 * unit.inv_norm  # not zeros_like: autograd tracks in-place additions to a part of what has a graph
    if with_grad:
        rows.slopes, rows.pulls = torch.zeros_like(unit.inv_norm), unit.inv_norm.new_zeros(z.shape)
    columns, gathered = itertools.tee(_columns(rows, exchange))
    accumulate_all(implementation, rows, columns, term, topology)
    return unit, rows, list(gathered)[1:]


def groups_of_rows(groups: Tensor | None, z: Tensor) -> Tensor | None:
    """[B] -> [V, B]."""
    return None if groups is None else groups.expand(len(z), -1).contiguous()


def _columns(rows: Side, exchange: Exchange) -> Iterator[Side]:
    """Yield the columns of all ranks, those of this rank first."""
    groups = itertools.repeat(None) if rows.groups is None else exchange.blocks(rows.groups)
    for u, groups_of_u in zip(exchange.blocks(rows.u), groups, strict=False):
        yield Side(u=u, groups=groups_of_u)


def accumulate_all(
    implementation: Implementation, rows: Side, columns: Iterator[Side], term: Term, topology: str
) -> None:
    """Accumulate over all pairs of the local rows.

    Args:
        implementation: Its `accumulate` is called for each pair of sides.
        rows: All views of this rank [V, B, D], with their accumulators.
        columns: This rank's blocks (the same tensors), then those of other ranks [Q, B, D].
        term: f.
        topology: As in `pair_terms`.
    """
    next(columns)
    if topology == "self":
        implementation.accumulate(rows, rows, term, 0)
        for others in columns:
            implementation.accumulate(rows, others, term, None)
        return
    view_a, view_b = _view(rows, 0), _view(rows, 1)
    implementation.accumulate(view_a, view_b, term, 0)
    for others in columns:
        implementation.accumulate(view_a, _view(others, 1), term, None)
        implementation.accumulate(view_b, _view(others, 0), term, None)


def _view(side: Side, view: int) -> Side:
    """Every second block, starting at `view`; shares memory with `side`."""
    return Side(**{name: x[view::2] for name, x in vars(side).items() if x is not None})


def total_of(x: Tensor, topology: str) -> Tensor:
    """Sum of [V, B] over the rows; with `cross` each pair is in the sums of both views, and the first is enough.

    In fp64, since the sums are over millions of pairs of rows.
    """
    return (x if topology == "self" else x[0]).sum(dtype=torch.float64).to(x.dtype)


def _forward(
    z: Tensor,
    inv_temperature: Tensor,
    bias: Tensor,
    groups: Tensor | None,
    kind: Kind,
    topology: str,
    impl: str,
    wide_range: bool,
    with_grad: bool,
    with_scale_grad: bool,
    exchange: Exchange = ALONE,
) -> tuple[Tensor, ...]:
    """Return positives, total, inv_norm [V, B], pulls [V, B, D] and d total / d b, each empty if it is not needed."""
    term = Term(kind=kind, inv_temperature=inv_temperature, bias=bias, wide_range=wide_range)
    unit, rows, _ = sum_over_pairs(z, groups, term, topology, impl, exchange, with_grad)
    assert rows.sums is not None
    total = total_of(rows.sums, topology)
    pulls = total.new_empty(0) if rows.pulls is None else rows.pulls
    slope = total_of(rows.slopes, topology) if with_scale_grad and rows.slopes is not None else total.new_empty(0)
    return unit.positives, total, unit.inv_norm, pulls, slope


_pair_terms = torch.library.custom_op(
    "fastssl::pair_terms",
    _forward,
    mutates_args=(),
    schema="(Tensor z, Tensor inv_temperature, Tensor bias, Tensor? groups, str kind, str topology, str impl, "
    "bool wide_range, bool with_grad, bool with_scale_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_pair_terms.register_fake
def _(z, *settings):
    *_, with_grad, with_scale_grad = settings
    return *fake_terms(z, with_grad=with_grad), z.new_empty(() if with_scale_grad else 0, dtype=wide_dtype(z))


def fake_terms(z: Tensor, *, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives, total, inv_norm and pulls without their values, for torch.compile."""
    num_views, num_samples, _ = z.shape
    shapes = ((num_views * (num_views - 1) // 2, num_samples), (), z.shape[:2], z.shape if with_grad else (0,))
    positives, total, inv_norm, pulls = (z.new_empty(shape, dtype=wide_dtype(z)) for shape in shapes)
    return positives, total, inv_norm, pulls


@torch.library.custom_op("fastssl::pair_terms_backward", mutates_args=())
def _pair_terms_backward(
    z: Tensor,
    inv_temperature: Tensor,
    inv_norm: Tensor,
    pulls: Tensor,
    slope: Tensor,
    positive_grads: Tensor,
    total_grad: Tensor,
    topology: str,
    impl: str,
    with_scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, dt, db; the last two are empty if they are not needed."""
    # `self`: a pair of rows on two ranks is in both ranks' totals, and the local rows receive the gradient of both.
    pull_scale = total_grad * inv_temperature * (2 if topology == "self" else 1)
    dz, dots = load_impl(impl).finish(z, inv_norm, pulls, pull_scale, positive_grads)
    if not with_scale_grad:
        return dz, total_grad.new_empty(0), total_grad.new_empty(0)
    return dz, total_grad * total_of(dots, topology), total_grad * slope


@_pair_terms_backward.register_fake
def _(z, inv_temperature, inv_norm, *settings):
    scale_grads = (inv_norm.new_empty(() if settings[-1] else 0) for _ in range(2))
    return torch.empty_like(z, memory_format=torch.contiguous_format), *scale_grads


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, inv_temperature, _, _, _, topology, impl, _, _, with_scale_grad, *_ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # avoids zeros of the size of the pulls, which are not used
    ctx.save_for_backward(z, inv_temperature, *output[2:])
    ctx.choices = (topology, impl, with_scale_grad)


def _backward(ctx: Any, positive_grads: Tensor | None, total_grad: Tensor | None, *_: Any) -> tuple:
    given = given_grads(positive_grads, total_grad, ctx.saved_tensors[2])
    dz, dt, db = _pair_terms_backward(*ctx.saved_tensors, *given, *ctx.choices)
    with_scale_grad = ctx.choices[-1]
    return dz, *((dt, db) if with_scale_grad else (None, None)), *[None] * (len(ctx.needs_input_grad) - 3)


def given_grads(positive_grads: Tensor | None, total_grad: Tensor | None, inv_norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `PairTerms`, zeros for outputs that the loss does not use; inv_norm [V, B]."""
    num_views, num_samples = inv_norm.shape
    if positive_grads is None:
        positive_grads = inv_norm.new_zeros(num_views * (num_views - 1) // 2, num_samples)
    return positive_grads, inv_norm.new_zeros(()) if total_grad is None else total_grad


_pair_terms.register_autograd(_backward, setup_context=_setup_context)


class _AcrossRanks(torch.autograd.Function):
    """The same for several ranks. Not a custom op, as the exchange is the caller's: torch.compile breaks the graph."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(once_differentiable(_backward))  # pyright: ignore[reportAssignmentType]
