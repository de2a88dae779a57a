"""The loss scale of fp16, against DeepSpeed's."""

import random

import torch

from fastssl.step import loss_scale
from fastssl.step.loss_scale import LossScale


def test_equals_deepspeeds_scaler(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it would print on the first rank
    monkeypatch.setattr(loss_scale, "LOSS_SCALE_WINDOW", 5)
    theirs = loss_scaler.DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=5,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
        dtype=torch.float16,
    )
    ours, chance = LossScale(), random.Random(0)
    scales = set()
    for step in range(3000):
        has_overflowed = chance.random() < (0.5 if step % 1000 < 100 else 0.05)
        theirs.update_scale(has_overflowed)
        ours.update(has_overflowed=has_overflowed)
        assert (ours.cur_scale, ours.cur_iter) == (theirs.cur_scale, theirs.cur_iter)
        assert ours.last_overflow_iter == theirs.last_overflow_iter
        scales.add(ours.cur_scale)
    assert min(scales) == 1
    assert max(scales) > 2.0**16
