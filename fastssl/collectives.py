"""Rank, world size, and the collectives used by losses and evaluation; the world size is 1 without a process group.

All gradients here follow one rule: each rank's loss is the mean over its own rows, and the engine AVERAGES parameter
gradients over ranks. Then the update equals that of one process on the global batch; see
docs/adr/0003-pair-sums-and-gradients-across-ranks.md. Every rank must call these in the same order, with equal shapes.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fastssl.errors import ConfigError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group exists (even one with a single rank)."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return torch_dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return torch_dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Wait until all ranks have reached this call."""
    if world_size() > 1:
        torch_dist.barrier()


@torch.no_grad()
def sum_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum tensors of one dtype over ranks, in one collective; all ranks must pass the same names and shapes."""
    if world_size() == 1 or not tensors:
        return tensors
    total = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    torch_dist.all_reduce(total)
    pieces = total.split([tensor.numel() for tensor in tensors.values()])
    return {name: piece.view_as(tensors[name]) for name, piece in zip(tensors, pieces, strict=True)}


def broadcast_object(value: T) -> T:
    """The first rank's value (plain or picklable), on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_first_rank(decide: Callable[[], T]) -> T:
    """Call `decide` on the first rank only, and return its result on every rank.

    Raises:
        ConfigError: `decide` raised it; it is raised on every rank, so that no rank waits for the others.
    """
    value, error = None, None
    if rank() == 0:
        try:
            value = decide()
        except ConfigError as found:
            error = str(found)
    value, error = broadcast_object((value, error))
    if error is not None:
        raise ConfigError(error)
    return cast("T", value)


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks (plain or picklable), in the order of the ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        torch_dist.all_gather_object(values, value)
    return values


def gather_on_first(value: T) -> list[T] | None:
    """The values of all ranks (plain or picklable), in the ranks' order, on the first rank; None on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    torch_dist.gather_object(value, values, dst=0)
    return values


@torch.no_grad()
def names_that_differ(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal on all ranks; all ranks must pass the same names and shapes."""
    if world_size() == 1 or not tensors:
        return []
    pieces = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    own = torch.cat(pieces)
    first = own.clone()
    torch_dist.broadcast(first, src=0)
    is_other = (own != first).split([len(piece) for piece in pieces])
    flags = torch.stack([part.any() for part in is_other]).int()
    torch_dist.all_reduce(flags, torch_dist.ReduceOp.MAX)
    return [name for name, flag in zip(tensors, flags.tolist(), strict=True) if flag]


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """Gather x from all ranks: [W, ...] in the order of the ranks, the same on each rank; no gradient."""
    if world_size() == 1:
        return x[None]
    gathered = x.new_empty(world_size() * x.numel())
    torch_dist.all_gather_into_tensor(gathered, x.reshape(-1))
    return gathered.view(world_size(), *x.shape)


@torch.no_grad()
def all_mean_(x: Tensor) -> Tensor:
    """Replace x by its mean over ranks, in place; for BatchNorm buffers and gradients outside the engine.

    Raises:
        ValueError: x does not have a floating dtype (a counter has no mean).
    """
    if not x.is_floating_point():
        raise ValueError(f"all_mean_ needs a floating dtype, got {x.dtype}")
    if world_size() > 1:
        total = x.contiguous()  # a copy if x is not contiguous: collectives need contiguous memory
        torch_dist.all_reduce(total)
        x.copy_(total / world_size())
    return x


def global_mean(x: Tensor) -> Tensor:
    """Mean over ranks of x, itself a mean over equally many elements on each rank; the gradient is passed through.

    For a term phi(mean over the global batch), the same on every rank. With m = (1/W) sum_r x_r the true gradient is
    d phi/d x_r = phi'(m)/W; the engine divides by W once more when it averages, so each rank hands it
    W * phi'(m)/W = phi'(m): the derivative with d m/d x_r read as 1.

    Args:
        x: Any shape, floating dtype, the same shape on every rank.

    Returns:
        The mean, same shape, differentiable in the local x.
    """
    mean = all_mean_(x.detach().clone())
    return mean + (x - x.detach())  # adds an exact 0 that carries the gradient


class Exchange:
    """The default process group as a `kernels.exchange.Exchange`."""

    def __init__(self) -> None:
        self._is_checked = False

    @property
    def size(self) -> int:
        """W."""
        return world_size()

    def check_same_shape(self, z: Tensor) -> None:
        """Refuse unequal shapes. On a GPU only at the first call: reading the other ranks' shapes synchronises.

        Raises:
            ValueError: The shapes differ; raised on every rank.
        """
        if world_size() == 1 or (z.is_cuda and self._is_checked):
            return
        self._is_checked = True
        shape = torch.tensor(z.shape, device=z.device)
        shapes = shape.new_empty(world_size() * len(shape))
        torch_dist.all_gather_into_tensor(shapes, shape)
        found = shapes.view(world_size(), -1).tolist()
        if any(other != found[0] for other in found):
            raise ValueError(f"z must have one shape on every rank, got {', '.join(map(str, found))}")

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield x [V, B, ...], then the blocks of the ranks before and after this one; overlaps with the gather."""
        x = x.detach()
        if world_size() == 1:
            yield x
            return
        x = x.contiguous()
        gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
        work = torch_dist.all_gather_into_tensor(gathered, x, async_op=True)
        yield x
        if work is not None:
            work.wait()
        start = rank() * len(x)
        yield from (piece for piece in (gathered[:start], gathered[start + len(x) :]) if len(piece))

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if world_size() > 1:
            torch_dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """See `global_mean`."""
        return global_mean(x) if world_size() > 1 else x


EXCHANGE = Exchange()
