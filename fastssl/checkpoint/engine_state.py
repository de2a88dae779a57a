"""State of DeepSpeed's engine, unpartitioned and by parameter name: independent of ZeRO stage and world size.

Stage 0 has one optimizer state per parameter. ZeRO 1 and 2 concatenate the parameters of a group, pad them, split the
result into one piece per rank, and give the client's optimizer the rank's fp32 piece as its only parameter, so its
state belongs to the piece. To save, the pieces are gathered on the first rank and split into parameters again; to
restore, the other way round. Values are only copied, so nothing is rounded.
"""

# W world size, K elements of one rank's piece; a group's flat tensor has W * K elements and ends with padding

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from fastssl import collectives
from fastssl.machine.private_api import client_optimizer, read_counters, write_counters, zero_groups

OptimizerState = dict[str, dict[str, Any]]


@torch.no_grad()
def collect_engine_state(engine: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The engine's state on the CPU (all ranks call it).

    Returns:
        The state shared by all ranks: "parameters" (fp32, by name; ZeRO's master weights if it has them), "buffers" (by
        name; the mean over ranks of those that differ), "optimizer" (by name, then by key), "counters" and, if the
        optimizer's groups count their steps as NVIDIA apex's do, "group_steps". "parameters" and "optimizer" are
        complete on the first rank only. And, second, this rank's buffers that differ between ranks.
    """
    parameters = {name: _on_cpu(value) for name, value in engine.module.named_parameters()}
    optimizer: OptimizerState = {}
    if _is_partitioned(engine):
        for group in _flat_groups(engine):
            parameters |= _gather(group, group.piece)
            _collect_group(group, client_optimizer(engine.optimizer).state.get(group.piece, {}), optimizer)
    else:
        for name, parameter in _optimized(engine):
            state = engine.optimizer.state.get(parameter, {})
            optimizer[name] = {key: _on_cpu(value) for key, value in state.items()}
    buffers, own_buffers = _collect_buffers(engine.module)
    shared = {
        "parameters": parameters,
        "buffers": buffers,
        "optimizer": optimizer,
        "counters": read_counters(engine),
    }
    group_steps = [group.get("step") for group in client_optimizer(engine.optimizer).param_groups]
    if any(step is not None for step in group_steps):
        shared["group_steps"] = group_steps
    return shared, own_buffers


@torch.no_grad()
def restore_engine_state(engine: Any, shared: Mapping[str, Any], own_buffers: Mapping[str, Tensor]) -> None:
    """Restore the result of `collect_engine_state` into an engine of any ZeRO stage and world size.

    Args:
        engine: A newly built engine for the same module.
        shared: The complete shared state, on every rank.
        own_buffers: This rank's buffers; buffers that are not in it are taken from `shared`.
    """
    for name, parameter in engine.module.named_parameters():
        parameter.copy_(shared["parameters"][name])
    buffers = dict(engine.module.named_buffers())
    for name, value in {**shared["buffers"], **own_buffers}.items():
        buffers[name].copy_(value)
    _restore_optimizer(engine, shared)
    write_counters(engine, shared["counters"])


@dataclass(frozen=True)
class _FlatGroup:
    """A parameter group under ZeRO 1 or 2.

    Attributes:
        piece: This rank's fp32 master weights, [K]; the parameter that the client's optimizer updates.
        numel: W * K.
        places: Name, parameter and offset in the flat tensor, for each parameter.
        device: Device of the process group's collectives (with offloading, the piece itself is on the CPU).
    """

    piece: Tensor
    numel: int
    places: Sequence[tuple[str, Tensor, int]]
    device: torch.device


def _is_partitioned(engine: Any) -> bool:
    return engine.zero_optimization_stage() > 0


def _names(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def _optimized(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters in the order of the client optimizer's groups (stage 0)."""
    names = _names(engine)
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _flat_groups(engine: Any) -> Iterator[_FlatGroup]:
    names = _names(engine)
    for group in zero_groups(engine.optimizer):
        places = [(names[id(p)], p, offset) for p, offset in zip(group.parameters, group.offsets, strict=True)]
        yield _FlatGroup(group.piece, group.numel, places, engine.device)


def _collect_group(group: _FlatGroup, state: Mapping[str, Any], found: OptimizerState) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == group.piece.shape:
            by_name: dict[str, Any] = _gather(group, value)
        else:  # a step count, shared by the group; copied, since a loaded alias would be incremented twice
            by_name = {name: _on_cpu(value) for name, _, _ in group.places}
        for name, item in by_name.items():
            found.setdefault(name, {})[key] = item


def _gather(group: _FlatGroup, piece: Tensor) -> dict[str, Tensor]:
    """Gather the ranks' pieces [K] and split them by parameter; {} on all ranks but the first."""
    own = piece.detach().to(group.device).contiguous()
    pieces = [torch.empty_like(own) for _ in range(collectives.world_size())] if collectives.rank() == 0 else None
    torch_dist.gather(own, pieces)
    if pieces is None:
        return {}
    flat = torch.cat(pieces).cpu()
    return {name: flat[at : at + p.numel()].view(p.shape).clone() for name, p, at in group.places}


def _cut(group: _FlatGroup, values: Mapping[str, Tensor]) -> Tensor:
    """This rank's piece [K] of the flat tensor built from `values`; zeros where a value is missing."""
    flat = torch.zeros(group.numel, dtype=group.piece.dtype)
    for name, parameter, offset in group.places:
        if name in values:
            flat[offset : offset + parameter.numel()] = values[name].reshape(-1)
    start = collectives.rank() * group.piece.numel()
    return flat[start : start + group.piece.numel()].clone()


def _restore_optimizer(engine: Any, shared: Mapping[str, Any]) -> None:
    saved: OptimizerState = shared["optimizer"]
    states = []
    if _is_partitioned(engine):
        for group in _flat_groups(engine):
            group.piece.data.copy_(_cut(group, shared["parameters"]))
            states.append(_piece_state(group, saved))
    else:
        states = [saved.get(name, {}) for name, _ in _optimized(engine)]
    _load_states(client_optimizer(engine.optimizer), states, shared.get("group_steps", ()))


def _piece_state(group: _FlatGroup, saved: OptimizerState) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, parameter, _ in group.places:
        for key, value in saved.get(name, {}).items():
            if key in state:
                continue
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                state[key] = _cut(group, {n: saved[n][key] for n, _, _ in group.places if key in saved.get(n, {})})
            else:
                state[key] = value
    return state


def _load_states(
    optimizer: torch.optim.Optimizer, states: Sequence[dict[str, Any]], group_steps: Sequence[int | None]
) -> None:
    """Load the state of each parameter; torch creates missing entries and moves them to the device."""
    groups = optimizer.state_dict()["param_groups"]
    for index, step in enumerate(group_steps):  # all None if the optimizer counts steps per parameter
        if step is not None:
            groups[index]["step"] = step
    optimizer.load_state_dict({"state": {i: s for i, s in enumerate(states) if s}, "param_groups": groups})


def _collect_buffers(module: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict's buffers, averaged over ranks where they differ; and this rank's values of those that differ."""
    saved = module.state_dict().keys()
    buffers = {name: value for name, value in module.named_buffers() if name in saved}
    differing = collectives.names_that_differ(buffers)
    own = {name: _on_cpu(buffers[name]) for name in differing}
    shared = {name: _on_cpu(value) for name, value in buffers.items()}
    for name in differing:
        if buffers[name].is_floating_point():
            shared[name] = collectives.all_mean_(buffers[name].clone()).cpu()
    return shared, own


def _on_cpu(value: Any) -> Any:
    """A CPU copy with its own storage: `torch.save` writes the whole storage of a view."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
