"""Config -> DeepSpeed's dictionary: the only place where it is written."""

from collections.abc import Mapping
from typing import Any

from fastssl.config import Config
from fastssl.errors import ConfigError

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
# Sections of DeepSpeed's configuration that `ds` may add to; it takes others in silence, also one that is misspelt.
PASSED = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_optimization",
)
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


def build_ds_config(cfg: Config, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one run.

    bf16 and fp16 go through torch's autocast, not through DeepSpeed's cast of the parameters: that one leaves batch
    norm's running statistics in another dtype than its input ("expected scalar type BFloat16 but found Float").

    Args:
        cfg: The run's configuration.
        world_size: Number of processes; divides data.global_batch_size.

    Returns:
        The dictionary for `deepspeed.initialize(config=...)`.

    Raises:
        ConfigError: `ds` says what another key of the configuration says, or what DeepSpeed would not read.
    """
    zero: dict[str, Any] = {"stage": cfg.train.zero_stage}
    if cfg.train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    own = {
        "train_batch_size": cfg.data.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.data.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        # Without ZeRO `fastssl.safe_step` clips: the engine would clip gradients of the loss times fp16's scale.
        "gradient_clipping": cfg.train.grad_clip_norm if cfg.train.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # SGD: tested here with every stage that the config allows
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": cfg.train.precision != "fp32",
            "dtype": _AUTOCAST.get(cfg.train.precision, "bfloat16"),
        },
        "steps_per_print": 10**12,  # fastssl prints its own progress
        # It would synchronise a GPU twice a step, for a speed that nobody prints.
        "timers": {"throughput": {"enabled": False}},
    }
    for section in cfg.ds:
        if section in _OURS:
            raise ConfigError(f"ds.{section}: set {_OURS[section]} instead, DeepSpeed's is written from it")
        if section not in PASSED:
            raise ConfigError(f"ds.{section}: not passed on to DeepSpeed; what can be: {', '.join(PASSED)}")
    return _merged(own, cfg.ds, "ds")


def _merged(own: dict[str, Any], raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Both, section by section; ConfigError where both say something."""
    merged = dict(own)
    for name, value in raw.items():
        if name not in own:
            merged[name] = value
        elif isinstance(own[name], dict) and isinstance(value, Mapping):
            merged[name] = _merged(own[name], value, f"{key}.{name}")
        else:
            raise ConfigError(f"{key}.{name}: fastssl writes it from its own keys (see fastssl/ds_config.py)")
    return merged
