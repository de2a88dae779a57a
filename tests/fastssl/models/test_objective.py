"""The objective owns the target: who is trained, what the target sees, how it moves."""

import pytest
import torch

from fastssl.losses import MincConfig, MioConfig, build_loss
from fastssl.models.config import ModelConfig
from fastssl.models.objective import Objective
from fastssl.models.two_view import TwoViewModel
from fastssl.optim import OptimConfig, build_optimizer
from fastssl.optim.schedules import ema_momentum

TINY = {"channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4, "layers": [1, 1, 1, 1]}
MODEL = ModelConfig(backbone="timm/resnet18", stem="cifar", backbone_kwargs=TINY, projector_dim=8)


def build(config) -> Objective:
    torch.manual_seed(0)
    return Objective(TwoViewModel(MODEL, image_px=16), build_loss(config, 8))


def follow(objective: Objective, step: int) -> None:
    """Move the target as after one of 10 steps."""
    momentum = objective.target_momentum(step, 10)
    assert momentum is not None
    objective.follow(torch.tensor(1 - momentum))


def views(*sizes_px: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(6, 3, px, px) for px in sizes_px]


def test_without_a_target_momentum_there_is_no_target() -> None:
    objective = build(MioConfig())
    assert objective.target is None
    objective(views(16, 16))
    assert objective.target_momentum(0, 10) is None
    assert not any("target" in name for name in objective.state_dict())


def test_the_target_starts_as_the_model_and_moves_by_the_schedule_only() -> None:
    objective = build(MincConfig(target_momentum=0.9))
    assert objective.target is not None
    weight, average = objective.model.backbone.conv1.weight, objective.target.backbone.conv1.weight
    assert torch.equal(weight, average)
    assert not any(parameter.requires_grad for parameter in objective.target.parameters())
    start = average.clone()
    optimizer = build_optimizer(objective, OptimConfig(base_lr=0.1))
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == len(list(objective.model.parameters()))
    for step in (0, 7):
        optimizer.zero_grad()
        objective(views(16, 16))[-1].backward()
        optimizer.step()
        before = average.clone()
        assert not torch.equal(weight, before)
        follow(objective, step)
        momentum = ema_momentum(step, 10, 0.9)
        torch.testing.assert_close(average, momentum * before + (1 - momentum) * weight)
    assert not torch.equal(average, start)
    assert objective.target_momentum(10, 10) == 1  # at the end


def test_the_target_stays_fp32_under_autocast_and_sees_the_views_without_gradient() -> None:
    objective = build(MincConfig())
    assert objective.target is not None
    seen = []
    objective.target.register_forward_hook(lambda module, args, out: seen.append((args[0], out[1])))
    with torch.autocast("cpu", torch.bfloat16):
        h, _, loss = objective(views(16, 16, 8, 8))
    assert [view.shape[2] for view in seen[0][0]] == [16, 16]  # the large crops
    assert [(z.dtype, z.requires_grad) for z in seen[0][1]] == [(torch.bfloat16, False)] * 2
    assert len(h) == 4
    assert loss.dtype == torch.float32
    follow(objective, 0)
    assert {value.dtype for value in objective.target.parameters()} == {torch.float32}


def test_a_step_outside_of_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="step 11"):
        build(MincConfig()).target_momentum(11, 10)
