"""Saves and loads checkpoints such that a kill at any moment leaves a complete checkpoint behind.

Each checkpoint is a folder, checkpoints/step_XXXXXXXX, of plain tensors by name, so that a run may resume with another
number of processes and another ZeRO stage:

| file          | what                                                                               |
|---------------|------------------------------------------------------------------------------------|
| state.pt      | all parameters and buffers, the optimizer's state, other state equal on all ranks  |
| rank_N.pt     | state of one rank: batch-norm buffers, random state, sums of the epoch             |
| weights.pt    | plain weights for users                                                            |
| manifest.json | size and SHA-256 of each file                                                      |

A checkpoint is written under a temporary name and renamed when all ranks are done; files are read with
weights_only=True. The last two checkpoints are kept, as a fallback if the newest is damaged.
"""

import hashlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import collectives
from fastssl.checkpoint.checksums import (
    MANIFEST,
    check_file,
    check_folder,
    read_manifest,
    save_file,
    write_manifest,
)
from fastssl.checkpoint.contents import check_contents
from fastssl.checkpoint.engine_state import collect_engine_state, restore_engine_state
from fastssl.checkpoint.tensor_file import DamagedError, is_out_of_memory, is_state, read_tensors
from fastssl.errors import ConfigError, UserError
from fastssl.tracking.run_folder import RunFolder
from pipelines.errors import one_line
from pipelines.path_names import why_no_path
from pipelines.printable import printable

_PREFIX = "step_"
_NAME = re.compile(rf"{_PREFIX}\d{{8,}}")
_NUM_KEPT = 2
_MAX_IMAGE_PX = 1 << 14

Sums = dict[str, dict[str, Tensor]]


def save_checkpoint(
    root: Path,
    engine: Any,
    *,
    step: int,
    state: Mapping[str, Any],
    sums: Sums,
    weights: Mapping[str, Any],
    run: Mapping[str, str] | None,
) -> None:
    """Save everything at `step` (all ranks call it).

    Args:
        root: The run's checkpoints folder.
        engine: DeepSpeed's engine.
        step: Number of optimizer steps taken.
        state: Other state of the run, equal on all ranks; tensors and plain values.
        sums: Tensors of this rank, by group and name, whose sum over ranks is meaningful.
        weights: Content of weights.pt, from `plain_weights`.
        run: From `RunFolder.identity`.
    """
    temporary, final = root / f".{_PREFIX}{step:08d}.tmp", root / f"{_PREFIX}{step:08d}"
    shared, own_buffers = collect_engine_state(engine)
    temporary.mkdir(parents=True, exist_ok=True)
    name = f"rank_{collectives.rank()}.pt"
    own = {"buffers": own_buffers, "sums": sums, "random": _random_state(engine.device)}
    files = {name: save_file(own, temporary / name)}
    if collectives.rank() == 0:
        files["state.pt"] = save_file({"engine": shared, "step": step, **state}, temporary / "state.pt")
        files["weights.pt"] = save_file(dict(weights), temporary / "weights.pt")
    of_ranks = collectives.all_gather_object(files)
    if collectives.rank() == 0:
        write_manifest(
            temporary,
            {k: v for files in of_ranks for k, v in files.items()},
            world_size=collectives.world_size(),
            run=run,
        )
        _publish(temporary, final)
    collectives.barrier()


def load_checkpoint(
    root: Path,
    engine: Any,
    *,
    seed: int,
    total_steps: int,
    check: Callable[[dict[str, Any]], None],
    take_up: Callable[[dict[str, Any]], None],
) -> None:
    """Restore a run from the newest whole checkpoint (all ranks call it); without any, nothing happens.

    With the same number of processes and kind of CPU as at the save, a run on the CPU continues bit for bit. With
    another number of processes, each rank gets the mean of the batch-norm buffers; the first rank gets the total of the
    sums, the others zeros. With another number or device, random states are derived from (seed, step, rank).

    A damaged checkpoint, and one whose content is not a state of this run, is reported on stderr and moved aside once
    an older one is restored.

    Args:
        root: The run's checkpoints folder.
        engine: DeepSpeed's engine, newly built.
        seed: The run's seed.
        total_steps: Optimizer steps of the whole run.
        check: Refuses the saved `state` of a run on other data, before anything is changed or counts as damage.
        take_up: Restores the rest of the run from the saved `state`, with "step", this rank's "sums" and the
            "world_size" of the save.
    Raises:
        ConfigError: there are checkpoints, but none is whole and in a readable format, or one is of another run.
    """

    def restore(path: Path) -> None:
        state = read_tensors(path / "state.pt", is_checked=True)
        check(state)
        world_size = read_manifest(path)["world_size"]
        is_same_world = world_size == collectives.world_size()
        ranks = [collectives.rank()] if is_same_world else range(world_size)
        saved = [read_tensors(path / f"rank_{rank}.pt", is_checked=True) for rank in ranks]
        own = saved[0]
        if not is_same_world:
            own = {"buffers": {}, "sums": _share_sums([each["sums"] for each in saved]), "random": {}}
        check_contents(state, own, engine, step=step_of(path), total_steps=total_steps)
        restore_engine_state(engine, state.pop("engine"), own["buffers"])
        _restore_random_state(own["random"], engine.device, f"{seed} {state['step']} {collectives.rank()}")
        take_up({**state, "sums": own["sums"], "world_size": world_size})

    damage: dict[Path, DamagedError] = {}
    while path := collectives.run_on_first_rank(lambda: newest_whole(root, damage)):
        problem = next((each for each in collectives.all_gather_object(_problem_of(restore, path)) if each), None)
        if problem is None:
            collectives.run_on_first_rank(lambda: set_aside(damage, path))
            return
        damage[path] = DamagedError(f"{path} is damaged: {problem}")


def _problem_of(restore: Callable[[Path], None], path: Path) -> str | None:
    """Restore this rank from a checkpoint; returns what is wrong with its content, in words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a tensor that is indexed by a name
            restore(path)
    except DamagedError as error:
        return str(error)
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):  # the user's settings, or the machine
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return f"it is not a state of this run ({type(error).__name__}: {one_line(error)[:200]})"
    return None


def load_objective_state(path: str | Path) -> dict[str, Tensor]:
    """Every parameter and buffer of a run's `Objective` by name, on the CPU: model, loss (predictor, moment), target.

    Args:
        path: A run's folder (for its newest checkpoint) or a checkpoint's folder.
    Returns:
        State dict for `Objective.load_state_dict`. Batch-norm statistics are the mean over ranks.
    Raises:
        ConfigError: there is no checkpoint, or it is damaged or in another format.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir():
        folder = checkpoint_of(folder / "checkpoints", None)
    check_origin(folder, read_manifest(folder))
    file = folder / "state.pt"
    state = read_tensors(file, is_checked=check_file(file))
    try:
        parameters, buffers = (state["engine"][part] for part in ("parameters", "buffers"))
    except (KeyError, TypeError, IndexError):
        parameters = buffers = None
    if not is_state(parameters) or not is_state(buffers):
        raise DamagedError(f"{file} is damaged: it has no parameters and buffers")
    return parameters | buffers


def last_checkpoint(root: Path) -> Path | None:
    """The newest finished checkpoint of a run, by its name; its files are not checked."""
    return max(_finished(root), default=None)


def checkpoint_of(root: Path, step: int | None, *, option: str = "--step") -> Path:
    """The checkpoint of a step; None: the newest.

    Args:
        root: Folder of the checkpoints.
        step: The step.
        option: What named the step, for the error message.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    steps = sorted(map(step_of, _finished(root)))
    if not steps:
        raise ConfigError(f"{root.parent} has no checkpoint yet")
    if step is not None and step not in steps:
        raise ConfigError(
            f"{option}: {root.parent} has no checkpoint of step {step}, only of {', '.join(map(str, steps))}"
        )
    return root / f"{_PREFIX}{steps[-1] if step is None else step:08d}"


def step_of(path: Path) -> int:
    """Number of optimizer steps taken when a checkpoint was saved."""
    return int(path.name.removeprefix(_PREFIX))


def _finished(root: Path) -> list[Path]:
    """The checkpoints in a run's folder; a user's copy under another name is ignored."""
    return [path for path in root.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name)]


def prune(root: Path, *, keep_every_steps: int, keep_step: int | None = None) -> None:
    """Delete incomplete checkpoints, and all but the last two, every `keep_every_steps`-th and `keep_step` (rank 0)."""
    drop_incomplete(root)
    for path in sorted(_finished(root))[:-_NUM_KEPT]:
        step = step_of(path)
        if step != keep_step and not (keep_every_steps and step % keep_every_steps == 0):
            # Renamed first: half deleted, it must not look complete. Network file systems may keep files being read.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")), ignore_errors=True)


def drop_incomplete(root: Path) -> None:
    """Delete incomplete checkpoints left by a killed save (rank 0)."""
    for path in root.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def plain_weights(
    model: nn.Module,
    model_config: Mapping[str, Any],
    image_px: int,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    backbone_class: str | None = None,
) -> dict[str, Any]:
    """The content of weights.pt (all ranks call it): "backbone" loads directly into the torchvision or timm model.

    Each rank's batch norm saw different images, so running statistics are averaged over the ranks.

    Args:
        model: With a backbone and a projector.
        model_config: The model section, as plain values.
        image_px: Side of the training images in pixels.
        preprocessing: From `pipelines.preprocessing.describe_preprocessing`; with it, the file needs no run around it.
        backbone_class: Name of the backbone's class, if it was given from Python; None: it is the section's.
    """
    contiguous = torch.contiguous_format
    state = {name: value.detach().clone(memory_format=contiguous) for name, value in model.state_dict().items()}
    for name, _ in model.named_buffers():
        if name in state and state[name].is_floating_point():
            collectives.all_mean_(state[name])
    parts = {part: _strip(state, f"{part}.") for part in ("backbone", "projector")}
    about = {"model": dict(model_config), "image_px": image_px}
    if preprocessing is not None:
        about |= {"preprocessing": dict(preprocessing), "backbone_class": backbone_class}
    return parts | about


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read weights.pt onto the CPU from a run's folder, a checkpoint's folder, or the file itself.

    Returns:
        "backbone" and "projector", state dicts; "model", the model section; "image_px"; "preprocessing" and
        "backbone_class", None in files from before there were these (see `plain_weights`; they are not checked here).
    Raises:
        ConfigError: the file is missing, not a fastssl weights file, or damaged.
    """
    file = find_weights(path)
    if (file.parent / MANIFEST).exists():
        check_origin(file.parent, read_manifest(file.parent))
    weights = read_tensors(file, is_checked=check_file(file))
    is_known = isinstance(weights, dict) and all(is_state(weights.get(part)) for part in ("backbone", "projector"))
    if not is_known or not isinstance(weights.get("model"), dict) or not _is_image_px(weights.get("image_px")):
        raise ConfigError(f"{file} is not a file of fastssl, or it is damaged")
    about = {key: weights.get(key) for key in ("preprocessing", "backbone_class")}
    return {key: weights[key] for key in ("backbone", "projector", "model", "image_px")} | about


def _is_image_px(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_IMAGE_PX


def find_weights(path: str | Path) -> Path:
    """The weights.pt of a run's folder (of its last checkpoint), of a checkpoint's folder, or the file itself.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    if reason := why_no_path(path):
        raise ConfigError(f"no weights at {str(path)!r:.300}: {reason}")
    if path.is_dir():
        folder = path if (path / "weights.pt").exists() else last_checkpoint(path / "checkpoints")
        path = (folder or path) / "weights.pt"
    if not path.is_file():
        raise ConfigError(f"no weights at {path}: give a run's folder, a checkpoint's folder or a weights.pt")
    return path


def check_origin(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a checkpoint in the folder of a run that did not save it. Without an identity on either side it is taken.

    Args:
        folder: The checkpoint's folder, in the checkpoints folder of a run or anywhere else.
        manifest: Its manifest.
    Raises:
        ConfigError: it is of another run, or the run's model, loss or optimizer section was edited since.
    """
    run = RunFolder(folder.absolute().parent.parent)
    saved, own = manifest.get("run"), run.identity()
    if not saved or own is None or saved == own:
        return
    if saved.get("id") != own["id"]:
        raise ConfigError(
            f"{folder} is a checkpoint of another run ({saved.get('id', '?'):.16}) than {run.path} ({own['id']}): move "
            "it out of this folder; elsewhere, run.init_from takes its weights"
        )
    raise ConfigError(
        f"{folder} was saved with other model, loss, optim or custom sections than {run.config} has now: undo the "
        "change there, or start another run.dir"
    )


def newest_whole(root: Path, damage: dict[Path, DamagedError]) -> Path | None:
    """The newest undamaged checkpoint that is not in `damage`; newer, damaged ones are added to it."""
    for path in sorted(_finished(root), reverse=True):
        if path in damage:
            continue
        try:
            check_folder(path)
        except DamagedError as error:
            damage[path] = error
            continue
        check_origin(path, read_manifest(path))
        return path
    if damage:
        raise ConfigError(
            f"{next(iter(damage.values()))}, and no older checkpoint is whole: start another run.dir (run.init_from "
            "takes a weights.pt that is left)"
        )
    return None


def set_aside(damage: Mapping[Path, DamagedError], taken: Path) -> None:
    """Report damaged checkpoints on stderr and move them aside, as the run resumes from `taken`."""
    for path, error in damage.items():
        aside = _move_aside(path)
        line = f"fastssl: warning: {error}: resuming from {taken.name} instead ({path.name} is now {aside.name})"
        print(printable(line), file=sys.stderr, flush=True)


def _move_aside(path: Path) -> Path:
    """Rename it, since another checkpoint will be saved at its step; it is not deleted, as a disk may recover."""
    aside = path.with_name(f"damaged_{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _random_state(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"device": device.type, "cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})


def _restore_random_state(saved: Mapping[str, Any], device: torch.device, key: str) -> None:
    """Restore the saved state or, if there is none for this rank and type of device, derive one from the key."""
    if saved.get("device") != device.type:
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
        return
    torch.set_rng_state(saved["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"])


def _share_sums(of_ranks: list[Sums]) -> Sums:
    """The total on the first rank, zeros on the others."""
    is_first = collectives.rank() == 0
    return {
        group: {
            name: sum((sums[group][name] for sums in of_ranks[1:]), value) if is_first else torch.zeros_like(value)
            for name, value in tensors.items()
        }
        for group, tensors in of_ranks[0].items()
    }


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.cpu() for name, value in state.items() if name.startswith(prefix)}


def _publish(temporary: Path, final: Path) -> None:
    """Rename a finished checkpoint; an existing one of that name is of the same run and step, and is kept."""
    if final.exists():
        shutil.rmtree(temporary)
        return
    _sync_folder(temporary)
    temporary.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
