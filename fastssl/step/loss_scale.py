"""The dynamic loss scale of fp16: halved at an overflow, doubled after a long time without one."""

from dataclasses import dataclass

# The defaults of torch.amp.GradScaler.
INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_WINDOW = 2000
_LEAST = 1.0


@dataclass
class LossScale:
    """The scale and its history; the same numbers as DeepSpeed's DynamicLossScaler, which is not documented for use.

    Attributes:
        cur_scale: Factor of the loss.
        cur_iter: Number of updates so far.
        last_overflow_iter: `cur_iter` at the last overflow.
    """

    cur_scale: float = INITIAL_LOSS_SCALE
    cur_iter: int = 0
    last_overflow_iter: int = -1

    @property
    def is_least(self) -> bool:
        """Whether it cannot be halved any more."""
        return self.cur_scale <= _LEAST

    def update(self, *, has_overflowed: bool) -> None:
        """Note whether a step overflowed, and set the scale of the next one."""
        if has_overflowed:
            self.cur_scale = max(self.cur_scale / 2, _LEAST)
            self.last_overflow_iter = self.cur_iter
        else:
            num_good = self.cur_iter - self.last_overflow_iter - 1  # before this step
            if num_good > 0 and num_good % LOSS_SCALE_WINDOW == 0:
                self.cur_scale *= 2
        self.cur_iter += 1
