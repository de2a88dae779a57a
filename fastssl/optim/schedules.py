"""Schedules over a run, as pure functions of the optimizer step."""

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

    The peak is base_lr * global_batch_size / 256 (Goyal et al. 2017, arXiv:1706.02677). Step 0 uses
    1/(warmup_steps + 1) of it, so it is never 0; step warmup_steps uses all of it; step total_steps, one after the
    last, would use final_fraction of it.

    Args:
        step: Number of optimizer steps taken before this one.
        base_lr: Peak for a global batch of 256.
        global_batch_size: Images per step.
        warmup_steps: Number of warm-up steps; the rate increases at each of them.
        total_steps: Number of steps of the run.
        final_fraction: Final value of the cosine, as a fraction of the peak.
        steps_per_change: The cosine is constant for this many steps; the steps of an epoch give torch's
            CosineAnnealingLR stepped once per epoch.

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
    """Momentum of a target network: from base at step 0 to 1 at total_steps, on a cosine.

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
