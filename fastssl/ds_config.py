"""Config -> DeepSpeed's dictionary: the only place where it is written."""

from typing import Any

from fastssl.config import Config


def build_ds_config(cfg: Config, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one run.

    bf16 goes through torch's autocast, not through DeepSpeed's cast of the parameters: that one leaves batch
    norm's running statistics in another dtype than its input ("expected scalar type BFloat16 but found Float").

    Args:
        cfg: The run's configuration.
        world_size: Number of processes; divides data.global_batch_size.
    Returns:
        The dictionary for `deepspeed.initialize(config=...)`.
    """
    return {
        "train_batch_size": cfg.data.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.data.global_batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.train.grad_clip_norm,
        "zero_optimization": {"stage": cfg.train.zero_stage},
        "zero_allow_untested_optimizer": True,  # SGD: tested here with every stage that the config allows
        "torch_autocast": {"enabled": cfg.train.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**12,  # fastssl prints its own progress
        # It would synchronise a GPU twice a step, for a speed that nobody prints.
        "timers": {"throughput": {"enabled": False}},
    }
