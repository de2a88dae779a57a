"""What a run must remember, written so that a kill at any moment leaves a whole checkpoint behind.

One folder a checkpoint, checkpoints/step_XXXXXXXX: DeepSpeed's files (weights, optimizer), rank_N.pt (each rank's
own batch-norm buffers and random state: DeepSpeed keeps rank 0's alone), weights.pt (plain weights for users).
It is written under a temporary name and renamed when every rank is done.
"""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.errors import ConfigError

_PREFIX = "step_"


def save_checkpoint(
    root: Path,
    engine: Any,
    *,
    step: int,
    state: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    weights: Mapping[str, Any],
) -> None:
    """Save everything at `step` (all ranks call it).

    Args:
        root: The run's checkpoints folder.
        engine: DeepSpeed's engine.
        step: Number of optimizer steps taken.
        state: What else the run must remember, equal on all ranks; tensors and plain values.
        rank_state: What this rank alone knows; likewise.
        weights: Content of weights.pt, from `plain_weights`.
    """
    temporary, final = root / f".{_PREFIX}{step:08d}.tmp", root / f"{_PREFIX}{step:08d}"
    engine.save_checkpoint(str(root), tag=temporary.name, client_state=dict(state), save_latest=False)
    torch.save(_rank_state(engine) | dict(rank_state), temporary / f"rank_{dist.rank()}.pt")
    if dist.rank() == 0:
        torch.save(dict(weights), temporary / "weights.pt")
    dist.barrier()
    if dist.rank() == 0:
        _publish(temporary, final)
    dist.barrier()


def load_checkpoint(path: Path, engine: Any) -> dict[str, Any]:
    """Restore weights, optimizer, buffers and random state (all ranks call it).

    Returns:
        `state` of the save, and this rank's `rank_state`, in one mapping.

    Raises:
        ConfigError: the checkpoint is of another world size, or of another kind of device.
    """
    own = path / f"rank_{dist.rank()}.pt"
    num_ranks = len(list(path.glob("rank_*.pt")))
    if num_ranks != dist.world_size():
        raise ConfigError(f"{path} was saved by {num_ranks} processes; it cannot go on with {dist.world_size()}")
    rank_state = torch.load(own, map_location="cpu", weights_only=True)
    if rank_state["device"] != engine.device.type:
        raise ConfigError(
            f"{path} was saved on {rank_state['device']}; it cannot go on on {engine.device.type}: see run.device"
        )
    _, state = engine.load_checkpoint(str(path.parent), tag=path.name)
    buffers = dict(engine.module.named_buffers())
    for name, value in rank_state["buffers"].items():
        buffers[name].copy_(value)
    torch.set_rng_state(rank_state["rng_state"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(rank_state["cuda_rng_state"])
    return state | rank_state


def last_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return max(root.glob(f"{_PREFIX}*"), default=None)


def checkpoint_of(root: Path, step: int | None) -> Path:
    """The checkpoint of a step; None: the newest.

    Raises:
        ConfigError: there is none.
    """
    steps = sorted(map(step_of, root.glob(f"{_PREFIX}*")))
    if not steps:
        raise ConfigError(f"{root.parent} has no checkpoint yet")
    if step is not None and step not in steps:
        raise ConfigError(
            f"--step: {root.parent} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}"
        )
    return root / f"{_PREFIX}{steps[-1] if step is None else step:08d}"


def step_of(path: Path) -> int:
    """Number of optimizer steps taken when a checkpoint was saved."""
    return int(path.name.removeprefix(_PREFIX))


def prune(root: Path, *, keep_every_steps: int) -> None:
    """Delete what is not needed (rank 0): half-written ones, and all but the last and each `keep_every_steps`."""
    drop_half_written(root)
    last = last_checkpoint(root)
    for path in root.glob(f"{_PREFIX}*"):
        if path != last and not (keep_every_steps and step_of(path) % keep_every_steps == 0):
            shutil.rmtree(path)


def drop_half_written(root: Path) -> None:
    """Delete what a killed save left behind (rank 0)."""
    for path in root.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(path)


def plain_weights(model: nn.Module, model_config: Mapping[str, Any], image_px: int) -> dict[str, Any]:
    """The content of weights.pt (all ranks call it): "backbone" loads into the torchvision or timm model as it is.

    Each rank's batch norm saw its own images: running statistics are averaged over the ranks.
    """
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_buffers():
        if name in state and state[name].is_floating_point():
            dist.all_mean_(state[name])
    parts = {part: _strip(state, f"{part}.") for part in ("backbone", "projector")}
    return {**parts, "model": dict(model_config), "image_px": image_px}


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read the weights.pt of a run's folder, a checkpoint's folder, or a file itself, on the CPU.

    Raises:
        ConfigError: nothing there, or not a fastssl weights file.
    """
    file = _find_weights(Path(path))
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        return {key: weights[key] for key in ("backbone", "projector", "model", "image_px")}
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(f"{file} is no weights file of fastssl, or it is damaged") from error


def _find_weights(path: Path) -> Path:
    if path.is_dir():
        folder = path if (path / "weights.pt").exists() else last_checkpoint(path / "checkpoints")
        path = (folder or path) / "weights.pt"
    if not path.exists():
        raise ConfigError(f"no weights at {path}: give a run's folder, a checkpoint's folder or a weights.pt")
    return path


def _rank_state(engine: Any) -> dict[str, Any]:
    buffers = dict(engine.module.named_buffers())
    state: dict[str, Any] = {"device": engine.device.type, "buffers": buffers, "rng_state": torch.get_rng_state()}
    if engine.device.type == "cuda":
        state["cuda_rng_state"] = torch.cuda.get_rng_state()
    return state


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.cpu() for name, value in state.items() if name.startswith(prefix)}


def _publish(temporary: Path, final: Path) -> None:
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    temporary.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
