"""The two sums of a loss over pairs, in one pass; differentiable, also under torch.compile."""

# V views of B samples, D width, W ranks; s, t, b, f, slopes and pulls as in kernels/similarity/__init__.py
# m = V B rows on this rank; Neg(i): the columns that row i is compared with, except those of its own sample or group

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.exchange import ALONE, Exchange
from kernels.similarity import Impl, Kind, Side, Term, choose_impl, load_impl

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
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (z, inv_temperature, bias))
    impl = choose_impl(impl, z)
    settings = (kind, topology, impl, wide_range, with_grad)
    if exchange.size == 1 and impl == "reference":  # uses autograd, since the ops have only a first derivative
        positives, total, *_ = _forward(
            z, inv_temperature, bias, groups, *settings[:-1], with_grad=False, exchange=exchange
        )
    elif exchange.size == 1:
        positives, total, *_ = _pair_terms(z, inv_temperature, bias, groups, *settings)
    else:
        positives, total = _AcrossRanks.apply(z, inv_temperature, bias, groups, settings, exchange)  # pyright: ignore
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


def meetings(rows: Side, columns: Iterator[Side], topology: str) -> Iterator[tuple[Side, Side, int | None]]:
    """Yield the arguments of the calls of `accumulate`: (rows, columns, own).

    Args:
        rows: All views of this rank [V, B, D], with their accumulators.
        columns: This rank's blocks (the same tensors), then those of other ranks [Q, B, D].
        topology: As in `pair_terms`.
    """
    next(columns)
    if topology == "self":
        yield rows, rows, 0
        yield from ((rows, others, None) for others in columns)
        return
    view_a, view_b = _view(rows, 0), _view(rows, 1)
    yield view_a, view_b, 0
    for others in columns:
        yield view_a, _view(others, 1), None
        yield view_b, _view(others, 0), None


def _view(side: Side, view: int) -> Side:
    """Every second block, starting at `view`; shares memory with `side`."""
    return Side(**{name: x[view::2] for name, x in vars(side).items() if x is not None})


def counted_rows(x: Tensor, topology: str) -> Tensor:
    """The rows [..., B] whose sums make up the total: with `cross`, each pair is in the sums of both views."""
    return x if topology == "self" else x[0]


def _forward(
    z: Tensor,
    inv_temperature: Tensor,
    bias: Tensor,
    groups: Tensor | None,
    kind: Kind,
    topology: str,
    impl: Impl,
    wide_range: bool,
    with_grad: bool,
    exchange: Exchange,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return positives, total, inv_norm [V, B], pulls [V, B, D] (empty without gradient), d total / d b."""
    implementation = load_impl(impl)
    u, inv_norm, positives = implementation.normalize(z, inv_temperature)
    sums = 0 * inv_norm  # not zeros_like: autograd tracks in-place additions to parts of a tensor that has a graph
    rows = Side(u=u, groups=groups_of_rows(groups, z), sums=sums)
    if with_grad:
        rows.slopes = torch.zeros_like(inv_norm)
        rows.pulls = inv_norm.new_zeros(z.shape)
    term = Term(kind=kind, inv_temperature=inv_temperature, bias=bias, wide_range=wide_range)
    for side, columns, own in meetings(rows, column_sides(exchange, rows), topology):
        implementation.accumulate(side, columns, term, own)
    total = sum_wide(counted_rows(sums, topology))
    if rows.pulls is None or rows.slopes is None:
        return positives, total, inv_norm, inv_norm.new_empty(0), torch.zeros_like(total)
    return positives, total, inv_norm, rows.pulls, sum_wide(counted_rows(rows.slopes, topology))


def column_sides(exchange: Exchange, rows: Side) -> Iterator[Side]:
    """Yield the columns of all ranks, those of this rank first."""
    inputs = {"groups": rows.groups, "weights": rows.weights}
    pieces = {"u": exchange.blocks(rows.u)} | {name: exchange.blocks(x) for name, x in inputs.items() if x is not None}
    for parts in zip(*pieces.values(), strict=True):
        yield Side(**dict(zip(pieces, parts, strict=True)))


def groups_of_rows(groups: Tensor | None, z: Tensor) -> Tensor | None:
    """[B] -> [V, B]."""
    return None if groups is None else groups.expand(len(z), -1).contiguous()


def sum_wide(x: Tensor) -> Tensor:
    """Sum in fp64, since the sums are over millions of pairs of rows."""
    return x.sum(dtype=torch.float64).to(x.dtype)


def _backward(
    z: Tensor,
    inv_temperature: Tensor,
    inv_norm: Tensor,
    pulls: Tensor,
    slope: Tensor,
    positive_grads: Tensor,
    total_grad: Tensor,
    topology: str,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, dt, db."""
    # `self`: a pair of rows on two ranks is in both ranks' totals, and the local rows receive the gradient of both.
    pull_scale = total_grad * inv_temperature * (2 if topology == "self" else 1)
    dz, dots = load_impl(impl).finish(z, inv_norm, pulls, pull_scale, positive_grads)
    assert dots is not None
    return dz, total_grad * sum_wide(counted_rows(dots, topology)), total_grad * slope


@torch.library.custom_op("fastssl::pair_terms", mutates_args=())
def _pair_terms(
    z: Tensor,
    inv_temperature: Tensor,
    bias: Tensor,
    groups: Tensor | None,
    kind: str,
    topology: str,
    impl: str,
    wide_range: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(z, inv_temperature, bias, groups, kind, topology, impl, wide_range, with_grad, ALONE)  # pyright: ignore


@_pair_terms.register_fake
def _(z, inv_temperature, bias, groups, kind, topology, impl, wide_range, with_grad):
    num_views, num_samples, width = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    scalar = z.new_empty((), dtype=dtype)
    return (
        z.new_empty((num_views * (num_views - 1) // 2, num_samples), dtype=dtype),
        scalar,
        z.new_empty((num_views, num_samples), dtype=dtype),
        z.new_empty((num_views, num_samples, width) if with_grad else (0,), dtype=dtype),
        torch.empty_like(scalar),
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(z, inv_temperature, inv_norm, pulls, slope, positive_grads, total_grad, topology, impl)  # pyright: ignore


@_pair_terms_backward.register_fake
def _(z, inv_temperature, inv_norm, pulls, slope, positive_grads, total_grad, topology, impl):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(slope), torch.empty_like(slope)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, inv_temperature, _, _, _, topology, impl, _, _ = inputs
    _, _, inv_norm, pulls, slope = output
    ctx.mark_non_differentiable(inv_norm, pulls, slope)
    ctx.set_materialize_grads(False)  # avoids zeros of the size of the pulls, which are not used
    ctx.save_for_backward(z, inv_temperature, inv_norm, pulls, slope)
    ctx.choices = (topology, impl)


def _backward_of_op(ctx: Any, positive_grads: Tensor | None, total_grad: Tensor | None, *_: Any) -> tuple:
    *saved, inv_norm, pulls, slope = ctx.saved_tensors
    given = given_grads(positive_grads, total_grad, inv_norm)
    grads = _pair_terms_backward(*saved, inv_norm, pulls, slope, *given, *ctx.choices)
    return (*grads, *[None] * 6)


def given_grads(positive_grads: Tensor | None, total_grad: Tensor | None, inv_norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `PairTerms`, zeros for outputs that the loss does not use; inv_norm [V, B]."""
    num_views, num_samples = inv_norm.shape
    if positive_grads is None:
        positive_grads = inv_norm.new_zeros(num_views * (num_views - 1) // 2, num_samples)
    return positive_grads, inv_norm.new_zeros(()) if total_grad is None else total_grad


_pair_terms.register_autograd(_backward_of_op, setup_context=_setup_context)


class _AcrossRanks(torch.autograd.Function):
    """The same for several ranks. Not a custom op, as the exchange is the caller's: torch.compile breaks the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        inv_temperature: Tensor,
        bias: Tensor,
        groups: Tensor | None,
        settings: tuple,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor]:
        positives, total, *saved = _forward(z, inv_temperature, bias, groups, *settings, exchange)  # pyright: ignore
        ctx.save_for_backward(z, inv_temperature, *saved)
        ctx.choices = (settings[1], settings[2])
        return positives, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, positive_grads: Tensor, total_grad: Tensor) -> tuple:  # pyright: ignore
        grads = _backward(*ctx.saved_tensors, positive_grads, total_grad, *ctx.choices)  # pyright: ignore
        return (*grads, *[None] * 3)
