"""Every parameter is in one group; biases and norms are spared decay and adaptation; LARS follows its equation."""

import pytest
import torch
from torch import nn

from fastssl.optim import OptimConfig, build_optimizer


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def _set_gradients(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_groups_hold_every_parameter_once(name):
    model = _model()
    model[3].bias.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.1))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    weights, vectors = optimizer.param_groups
    assert weights["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0
    assert {p.ndim for p in weights["params"]} == {2, 4}
    assert {p.ndim for p in vectors["params"]} == {1}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_decay_all_decays_every_parameter_and_adapts_no_more_of_them(name):
    optimizer = build_optimizer(_model(), OptimConfig(name=name, weight_decay=0.1, decay_all=True))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert [group.get("adapt", True) for group in optimizer.param_groups] == [True, name not in ("lars", "lamb")]


def test_sgd_without_momentum_and_with_decay_everywhere_is_the_plain_step():
    model = _model()
    expected = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimConfig(base_lr=0.5, momentum=0, weight_decay=0.1, decay_all=True))
    for _ in range(3):
        _set_gradients(model)
        optimizer.step()
        for w, parameter in zip(expected, model.parameters(), strict=True):
            w.sub_(0.5 * (parameter.grad + 0.1 * w))
    for w, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), w)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_adapts_weights_only(weight_decay):
    model = _model()
    cfg = OptimConfig(name="lars", base_lr=0.5, weight_decay=weight_decay, momentum=0.9, lars_trust_coefficient=0.02)
    optimizer = build_optimizer(model, cfg)
    expected = [p.detach().clone() for p in model.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    for _ in range(3):
        _set_gradients(model)
        optimizer.step()
        for w, v, parameter in zip(expected, velocity, model.parameters(), strict=True):
            update = parameter.grad.clone()
            if w.ndim > 1:  # You et al. 2017, eq. 6: the layer's rate is eta |w| / (|g| + decay |w|)
                rate = 0.02 * w.norm() / (update.norm() + weight_decay * w.norm())
                update = rate * (update + weight_decay * w)
            v.mul_(0.9).add_(update)
            w.sub_(0.5 * v)
    for w, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), w)


def test_optimizers_take_their_settings():
    sgd = build_optimizer(_model(), OptimConfig(name="sgd", momentum=0.8, base_lr=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    assert [group["momentum"] for group in sgd.param_groups] == [0.8, 0.8]
    assert [group["lr"] for group in sgd.param_groups] == [0.3, 0.3]
    adamw = build_optimizer(_model(), OptimConfig(name="adamw", betas=(0.9, 0.95)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    lamb = build_optimizer(_model(), OptimConfig(name="lamb", betas=(0.9, 0.95)))
    assert [group["betas"] for group in lamb.param_groups] == [(0.9, 0.95)] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_lr", 0.0),
        ("weight_decay", -1e-4),
        ("momentum", 1.0),
        ("betas", (0.9, 1.0)),
        ("schedule", "batch"),
        ("warmup_epochs", -1.0),
        ("final_lr_fraction", 1.5),
        ("name", "adam"),
        ("impl", "cuda"),
    ],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        OptimConfig(**{field: value})
