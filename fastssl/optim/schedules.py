"""What changes over a run, as pure functions of the optimizer step."""

import math


def learning_rate(
    step: int,
    *,
    base_lr: float,
    global_batch_size: int,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float = 0.0,
    steps_per_change: int = 1,
) -> float:
    """Learning rate of a step: linear warm-up, then cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).

    The peak is base_lr * global_batch_size / 256 (Goyal et al. 2017, arXiv:1706.02677). Step 0 takes
    1/(warmup_steps + 1) of it, never nothing; step warmup_steps takes all of it; step total_steps, the first
    that is not taken, would take final_fraction of it.

    Args:
        step: Optimizer steps taken before this one.
        base_lr: Peak for a global batch of 256.
        global_batch_size: Images of a step.
        warmup_steps: Steps of the warm-up, which rises at every one of them.
        total_steps: Steps of the run.
        final_fraction: Where the cosine ends, as a fraction of the peak.
        steps_per_change: The cosine keeps its value for this many steps; those of an epoch give torch's
            CosineAnnealingLR stepped once an epoch.

    Raises:
        ValueError: a negative step or number of steps.
    """
    if step < 0 or warmup_steps < 0 or total_steps < 1 or steps_per_change < 1:
        raise ValueError(
            f"steps must not be negative: step {step}, warm-up {warmup_steps}, total {total_steps}, "
            f"a change every {steps_per_change}"
        )
    peak = base_lr * global_batch_size / 256
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    held = max(warmup_steps, step - step % steps_per_change)
    progress = min(1.0, (held - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * _half_cosine(progress))


def ema_momentum(step: int, total_steps: int, base: float) -> float:
    """Momentum of a target network: base at step 0, 1 at total_steps, on a cosine.

    Grill et al. 2020 (BYOL), arXiv:2006.07733, section 3.3.

    Raises:
        ValueError: a step outside of [0, total_steps], or base outside of [0, 1].
    """
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step {step} is not in [0, {total_steps}]")
    if not 0 <= base <= 1:
        raise ValueError(f"base must be in [0, 1], not {base}")
    return 1 - (1 - base) * _half_cosine(step / total_steps)


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2
