"""Builds DeepSpeed's configuration dictionary from a Config; the only place that does."""

from collections.abc import Mapping
from typing import Any

from fastssl.config import Config
from fastssl.errors import ConfigError
from pipelines.config_field import shown
from pipelines.errors import did_you_mean

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
# Sections of DeepSpeed's configuration that `ds` may set, and their types; DeepSpeed itself silently accepts unknown or
# misspelt ones, and fails with a traceback on another type.
PASSED: dict[str, type] = {
    "aio": dict,
    "comms_logger": dict,
    "communication_data_type": str,
    "dump_state": bool,
    "flops_profiler": dict,
    "gradient_predivide_factor": float,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "timers": dict,
    "torch_autocast": dict,
    "wall_clock_breakdown": bool,
    "zero_optimization": dict,
}
_TYPE_NAMES = {dict: "a section", bool: "true or false", str: "text", float: "a number"}
_OURS = {
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.global_batch_size",
    "gradient_clipping": "train.grad_clip_norm",
}
_REFUSED_IN_ZERO = {
    "offload_optimizer": "set train.offload_optimizer instead",
    "cpu_offload": "set train.offload_optimizer instead",
    "offload_param": "only ZeRO 3 offloads parameters, and train.zero_stage does not allow 3; remove it",
    "cpu_offload_param": "only ZeRO 3 offloads parameters, and train.zero_stage does not allow 3; remove it",
    "compute_grad_norm": "fastssl needs the norm, to detect gradients that are not finite and to log it; remove it",
    "zenflow": "it applies older gradients in some steps, which changes the training; use train.offload_optimizer "
    "instead",
    "legacy_stage1": "DeepSpeed no longer has it; set train.zero_stage=1 instead",
}


def build_ds_config(cfg: Config, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one run.

    bf16 and fp16 use torch's autocast instead of DeepSpeed's parameter cast: the latter leaves batch norm's running
    statistics in a different dtype from its input ("expected scalar type BFloat16 but found Float").

    Args:
        cfg: The run's configuration.
        world_size: Number of processes; divides data.global_batch_size.

    Returns:
        The dictionary for `deepspeed.initialize(config=...)`.

    Raises:
        ConfigError: `ds` sets something that another key of the configuration sets, that DeepSpeed would ignore or does
            not support at this stage, or that would change the training.
    """
    zero: dict[str, Any] = {"stage": cfg.train.zero_stage}
    if cfg.train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    own = {
        "train_batch_size": cfg.data.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.data.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        # Without ZeRO, `fastssl.step` clips: the engine would clip gradients that include fp16's loss scale.
        "gradient_clipping": cfg.train.grad_clip_norm if cfg.train.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # for SGD, which is tested here at every stage that the config allows
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": cfg.train.precision != "fp32",
            "dtype": _AUTOCAST.get(cfg.train.precision, "bfloat16"),
        },
        "steps_per_print": 10**12,  # fastssl prints its own progress
        # It would synchronise the GPU twice per step to measure a speed that is not printed.
        "timers": {"throughput": {"enabled": False}},
    }
    for section, value in cfg.ds.items():
        if section in _OURS:
            raise ConfigError(f"ds.{section}: set {_OURS[section]} instead, from which fastssl sets this")
        if section not in PASSED:
            hint = did_you_mean(section, PASSED) or f"; supported are {', '.join(PASSED)}"
            raise ConfigError(f"ds.{section} is not supported{hint}")
        _check_type(f"ds.{section}", value, PASSED[section])
        if PASSED[section] is dict and "enabled" in value:
            _check_type(f"ds.{section}.enabled", value["enabled"], bool)
    merged = _merged(own, cfg.ds, "ds")
    _check_zero(cfg)
    _check_averaging(cfg)
    return merged


def _check_type(key: str, value: Any, wanted: type) -> None:
    fits = isinstance(value, int | float if wanted is float else wanted) and (wanted is bool) == isinstance(value, bool)
    if not fits:
        raise ConfigError(f"{key} must be {_TYPE_NAMES[wanted]}, not {shown(value)}")


def _merged(own: dict[str, Any], raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Merge both, section by section; ConfigError if both set the same key."""
    merged = dict(own)
    for name, value in raw.items():
        if name not in own:
            merged[name] = value
        elif isinstance(own[name], dict) and isinstance(value, Mapping):
            merged[name] = _merged(own[name], value, f"{key}.{name}")
        else:
            raise ConfigError(
                f"{key}.{name}: fastssl sets it from its own keys (see fastssl/step/deepspeed_config.py); remove it"
            )
    return merged


def _check_zero(cfg: Config) -> None:
    section = cfg.ds.get("zero_optimization", {})
    for name, reason in _REFUSED_IN_ZERO.items():
        if name in section and not (name == "offload_optimizer" and cfg.train.offload_optimizer):
            raise ConfigError(f"ds.zero_optimization.{name}: {reason}")
    bucket_size = section.get("allgather_bucket_size", 0)
    if isinstance(bucket_size, int | float) and bucket_size % 2:
        raise ConfigError(f"ds.zero_optimization.allgather_bucket_size: must be even, not {bucket_size}")


def _check_averaging(cfg: Config) -> None:
    """Refuse settings for which DeepSpeed would fail with a traceback."""
    data_type = cfg.ds.get("communication_data_type", "fp32")
    if data_type.lower() not in ("fp16", "bf16", "fp32"):
        raise ConfigError(f"ds.communication_data_type: must be fp16, bf16 or fp32, not {data_type!r}")
    factor = cfg.ds.get("gradient_predivide_factor", 1.0)
    if factor <= 0:
        raise ConfigError(f"ds.gradient_predivide_factor: must be > 0, not {factor!r}")
    scatters = cfg.train.zero_stage == 2 and cfg.ds.get("zero_optimization", {}).get("reduce_scatter", True)
    if scatters and (factor != 1 or cfg.ds.get("prescale_gradients")):
        name = "prescale_gradients" if factor == 1 else "gradient_predivide_factor"
        raise ConfigError(f"ds.{name}: with train.zero_stage=2 it needs ds.zero_optimization.reduce_scatter=false")
