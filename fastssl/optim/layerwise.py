"""Shared by LARS and LAMB: the norms of whole layers, even if ZeRO has split the layers into fragments.

ZeRO 1 and 2 concatenate the layers of a parameter group, pad the end and give each rank one partition of it:

    layers      |----- 0 -----|-- 1 --|--- 2 ---|pad|
    partitions  |--- rank 0 ---|--- rank 1 ---|...      rank 0 has layer 0 and a fragment of layer 1

|layer|^2 is the sum over ranks of |fragment|^2, so one sum of a [layers, 2] table gives every rank the norms that an
unpartitioned optimizer would take. docs/adr/0009-layerwise-optimizers-under-zero.md has the reasons.
"""

# L number of layers of a group, F number of those with elements on this rank (without ZeRO: F = L)

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.optim import Optimizer

from fastssl.machine.private_api import client_optimizer, foreach, zero_groups


class WholeLayers:
    """The layers of a group if each is a separate tensor."""

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """One tensor per layer, from one tensor per parameter."""
        return tensors

    def norms(self, weights: list[Tensor], updates: list[Tensor]) -> Tensor:
        """|weights| and |updates| of each layer, [F, 2], on their device and in their dtype."""
        return _norms(weights, updates)


@dataclass(frozen=True)
class Partition:
    """One rank's partition of the group's layers, a flat tensor, and the layout of the layers in it.

    Attributes:
        num_layers: L, the number of non-empty layers.
        first_layer: Index of the first layer with elements here; the next F - 1 layers follow without a gap.
        spans: F pairs (start, length) in the flat tensor; elements outside of all spans are padding.
        process_group: The ranks that hold the other partitions.
        device: Device for their collectives; an offloaded partition is on the CPU, but NCCL needs the GPU.
    """

    num_layers: int
    first_layer: int
    spans: tuple[tuple[int, int], ...]
    process_group: Any
    device: torch.device

    def cut(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's fragments of the layers, as views of one flat tensor; the whole tensor if it is all padding."""
        (flat,) = tensors
        return [flat.narrow(0, start, length) for start, length in self.spans] or [flat]

    def norms(self, weights: list[Tensor], updates: list[Tensor]) -> Tensor:
        """As `WholeLayers.norms`, for the whole layers that the fragments belong to; all ranks of the group call it.

        The table is fp64, so that the norm of a layer that is entirely on one rank is exact to the last bit.
        """
        table = torch.zeros(self.num_layers, 2, dtype=torch.float64, device=self.device)
        own = table[self.first_layer : self.first_layer + len(self.spans)]
        if self.spans:
            own.copy_(_norms(weights, updates).double().square())
        torch_dist.all_reduce(table, group=self.process_group)
        norms = own.sqrt() if self.spans else table.new_zeros(1, 2)
        return norms.to(weights[0])


class LayerwiseOptimizer(Optimizer):
    """A torch optimizer whose groups have a flag "adapt": whether steps are scaled by layer norms.

    Under ZeRO `bind_partitions` must be called after DeepSpeed has wrapped it, before the first step.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, {"adapt": True, **defaults})
        self._partitions: dict[Tensor, Partition] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, without a host synchronisation."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params, self._layers(group, params))
        return loss

    def bind(self, flat: Tensor, partition: Partition) -> None:
        """Register the layout of a flat parameter of an adapted group."""
        self._partitions[flat] = partition

    def _step_group(self, group: dict[str, Any], params: list[Tensor], layers: WholeLayers | Partition) -> None:
        raise NotImplementedError

    def _layers(self, group: dict[str, Any], params: list[Tensor]) -> WholeLayers | Partition:
        if not group["adapt"]:
            return WholeLayers()  # the step is elementwise, so layers do not matter
        if params[0] in self._partitions:
            return self._partitions[params[0]]
        if any(p.ndim < 2 for p in params):
            raise RuntimeError(
                f"{type(self).__name__} adapts whole layers, and got a flat tensor: call bind_partitions under ZeRO"
            )
        return WholeLayers()

    def _state_of(self, name: str, params: list[Tensor]) -> list[Tensor]:
        """The named state of each parameter, of its shape, initialised to zero."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]


def bind_partitions(engine_optimizer: Any) -> None:
    """Tell a `LayerwiseOptimizer` which layers are in ZeRO's partitions of its groups.

    Args:
        engine_optimizer: The optimizer returned by `deepspeed.initialize`. Does nothing unless it is a ZeRO 1 or 2
            optimizer that wraps a `LayerwiseOptimizer`.
    """
    optimizer = client_optimizer(engine_optimizer)
    if optimizer is engine_optimizer or not isinstance(optimizer, LayerwiseOptimizer):
        return
    for group in zero_groups(engine_optimizer):
        flat, layers = group.piece, group.parameters
        begin = torch_dist.get_rank(group.process_group) * len(flat)
        bounds = [
            (max(offset - begin, 0), min(offset + layer.numel() - begin, len(flat)))
            for layer, offset in zip(layers, group.offsets, strict=True)
        ]
        here = [number for number, (start, end) in enumerate(bounds) if start < end]
        partition = Partition(
            num_layers=len(layers),
            first_layer=here[0] if here else 0,
            spans=tuple((bounds[number][0], bounds[number][1] - bounds[number][0]) for number in here),
            process_group=group.process_group,
            device=layers[0].device,
        )
        optimizer.bind(flat, partition)


def move(weights: list[Tensor], updates: list[Tensor], learning_rate: float | Tensor) -> None:
    """w <- w - lr u; the rate is a number, or a 0-dim tensor on the device that is not read on the host."""
    if isinstance(learning_rate, Tensor):
        foreach.sub_(weights, foreach.mul(updates, learning_rate))
    else:
        foreach.add_(weights, updates, alpha=-learning_rate)


def _norms(weights: list[Tensor], updates: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack(foreach.norm(tensors)) for tensors in (weights, updates)], dim=1)
