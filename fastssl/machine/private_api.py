"""Every private or undocumented name of torch and DeepSpeed that fastssl uses, and a check at start that they exist.

No other file uses such a name, so a new version of a library is tried here. Each function says which documented way is
missing. Checked with the versions in TRIED.
"""

# K elements of one rank's piece, W world size

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from fastssl.errors import UserError

# Versions that the tests ran with, as pip takes them; requirements/ has those that `make` installs.
TRIED = {"torch": ">=2.11,<2.14", "deepspeed": "==0.19.8"}

FOREACH = (
    "add",
    "add_",
    "addcmul_",
    "copy_",
    "div",
    "div_",
    "lerp_",
    "mul",
    "mul_",
    "norm",
    "sqrt",
    "sub_",
)
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
ENGINE = ("enable_backward_allreduce", "torch_autocast_z0_gradscaler", *COUNTERS)
ZERO = (
    "bit16_groups_flat",
    "optimizer",
    "overflow",
    "override_loss_scale",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups",
    "torch_autocast_gradscaler",
)

# torch's operators on lists of tensors, one kernel launch for many tensors: `foreach.mul_` is `torch._foreach_mul_`.
# torch's own optimizers use them; torch documents none of them as stable, and has no other such operators.
foreach = SimpleNamespace(**{name: getattr(torch, f"_foreach_{name}", None) for name in FOREACH})

# The base class of torch's batch norms: torch has no documented one. It calls its own `_check_input_dim`.
BatchNormBase: type[nn.BatchNorm1d] = getattr(nn.modules.batchnorm, "_BatchNorm", nn.BatchNorm1d)


def check_libraries(device: torch.device) -> None:
    """Check that torch and DeepSpeed have the names used here, before a training builds anything.

    A version that was not tried but has them is one line of warning, on the first rank.

    Raises:
        UserError: A name is missing.
    """
    import deepspeed
    from deepspeed.utils import groups

    names = [f"_foreach_{name}" for name in FOREACH if not hasattr(torch, f"_foreach_{name}")]
    if not hasattr(nn.modules.batchnorm, "_BatchNorm"):
        names.append("nn.modules.batchnorm._BatchNorm")
    if not hasattr(BatchNormBase, "_check_input_dim"):
        names.append("nn.modules.batchnorm._BatchNorm._check_input_dim")
    if not hasattr(torch.optim.SGD([torch.zeros(1)], fused=True), "_step_supports_amp_scaling"):
        names.append("optim.SGD._step_supports_amp_scaling")
    _require("torch", names)

    names = [] if hasattr(groups, "_WORLD_GROUP") else ["utils.groups._WORLD_GROUP"]
    if device.type == "cpu" and not hasattr(deepspeed.ops, "__compatible_ops__"):
        names.append("ops.__compatible_ops__")
    _require("deepspeed", names)
    for library in TRIED:
        _warn_if_not_tried(library)


def check_engine(engine: Any) -> None:
    """Check that a new DeepSpeed engine has the attributes used here, before the first step.

    Raises:
        UserError: An attribute is missing.
    """
    names = [f"DeepSpeedEngine.{name}" for name in ENGINE if not hasattr(engine, name)]
    if engine.zero_optimization():
        zero = engine.optimizer
        names += [f"{type(zero).__name__}.{name}" for name in ZERO if not hasattr(zero, name)]
    _require("deepspeed", names)


def _require(library: str, missing: list[str]) -> None:
    if missing:
        names = ", ".join(f"{library}.{name}" for name in missing)
        raise UserError(
            f"{library} {_version(library)} does not have {names}, which fastssl uses: install a version that fastssl "
            f"was tried with, pip install '{library}{TRIED[library]}'"
        )


def _warn_if_not_tried(library: str) -> None:
    from packaging.specifiers import SpecifierSet

    version, tried = _version(library), TRIED[library]
    if os.environ.get("RANK", "0") == "0" and not SpecifierSet(tried).contains(version, prereleases=True):
        print(
            f"fastssl: warning: fastssl was not tried with {library} {version}, but with {library}{tried}; everything "
            "that it needs is there",
            file=sys.stderr,
            flush=True,
        )


def _version(library: str) -> str:
    return sys.modules[library].__version__


# --- torch


def join_store(timeout: timedelta) -> tuple[Any, int, int]:
    """The launcher's key-value store, this process's rank and the world size, from the environment.

    `init_process_group` does not return the store, and a TCPStore of our own would clash with torchrun's.
    """
    return next(rendezvous("env://", timeout=timeout))


def skip_fused_step_if(optimizer: Optimizer, is_skipped: Tensor) -> None:
    """Have a fused SGD or AdamW change nothing at its next step if `is_skipped` (bool, 0-dim) is true.

    Only torch's GradScaler is documented to do this, and it reads the flag on the host.
    """
    # fp32 and exactly 1: the fused kernels compare it with 1, and AdamW's subtracts it from the step count.
    optimizer.found_inf = is_skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]


# --- DeepSpeed's start


def import_deepspeed() -> Any:
    """The package deepspeed, imported without MLflow: its autotuner imports that where it is installed, one second.

    It has no setting for this. What is imported already stays, and MLflow can be imported afterwards.
    """
    is_hidden = "mlflow" not in sys.modules
    if is_hidden:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]  # Python's sign of what cannot be imported
    try:
        import deepspeed
    finally:
        if is_hidden:
            del sys.modules["mlflow"]
    return deepspeed


def use_gloo_for_shared_memory() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective for CPUs, which takes a minute and a half.

    It has no setting for this.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_world_group(group: Any) -> None:
    """Have DeepSpeed exchange gradients in this group; None: in one that it makes.

    It would make one with torch's default timeout, and has no setting for the timeout. It also keeps that of a default
    group which is destroyed since.
    """
    from deepspeed.utils import groups

    groups._WORLD_GROUP = group


# --- DeepSpeed's engine


def disable_gradient_averaging(engine: Any) -> None:
    """Keep the engine of a single process from copying every gradient twice to average it with no other."""
    engine.enable_backward_allreduce = False


def disable_gradient_scalers(engine: Any) -> None:
    """Take away the fp16 loss scalers of torch_autocast: DeepSpeed cannot have that section without them."""
    engine.torch_autocast_z0_gradscaler = None
    if engine.zero_optimization():
        engine.optimizer.torch_autocast_gradscaler = None


def read_counters(engine: Any) -> dict[str, int]:
    """The engine's counters of steps and samples, by name; only its own checkpoints are documented to keep them."""
    return {name: getattr(engine, name) for name in COUNTERS}


def write_counters(engine: Any, counters: Mapping[str, int]) -> None:
    """Restore what `read_counters` returned."""
    for name, value in counters.items():
        setattr(engine, name, value)


def count_bypassed_step(engine: Any) -> None:
    """Count a step that was taken without the engine."""
    engine.global_steps += 1
    engine.micro_steps += 1
    engine.global_samples += engine.train_batch_size()


# --- DeepSpeed's optimizer under ZeRO 1 and 2


@dataclass(frozen=True)
class ZeroGroup:
    """A parameter group under ZeRO 1 or 2: concatenated, padded, and split into one piece per rank.

    Attributes:
        piece: This rank's fp32 master weights, [K]; the parameter that the client's optimizer updates.
        numel: W * K.
        parameters: In their order in the flat tensor.
        offsets: Where each begins in the flat tensor.
        process_group: The ranks that hold the other pieces.
    """

    piece: Tensor
    numel: int
    parameters: list[Tensor]
    offsets: list[int]
    process_group: Any


def zero_groups(zero: Any) -> Iterator[ZeroGroup]:
    """The parameter groups of DeepSpeed's ZeRO optimizer.

    DeepSpeed documents access to single parameters only (`safe_get_full_fp32_param`), with one collective for each.
    """
    for index, piece in enumerate(zero.single_partition_of_fp32_groups):
        yield ZeroGroup(
            piece=piece,
            numel=zero.bit16_groups_flat[index].numel(),
            parameters=zero.round_robin_bit16_groups[index],
            offsets=zero.round_robin_bit16_offsets[index],
            process_group=zero.real_dp_process_group[index],
        )


def client_optimizer(engine_optimizer: Any) -> Optimizer:
    """The optimizer that was passed to `deepspeed.initialize`, which ZeRO's wraps without a documented way to it."""
    return getattr(engine_optimizer, "optimizer", engine_optimizer)


def set_loss_scale(zero: Any, scale: float) -> None:
    """Have ZeRO's optimizer scale the loss, and unscale gradients before it clips them; its own scale is dynamic."""
    zero.override_loss_scale(scale)


def has_overflowed(zero: Any) -> bool:
    """Whether ZeRO's optimizer skipped its last step; DeepSpeed's documented norm is then of no use."""
    return bool(zero.overflow)
