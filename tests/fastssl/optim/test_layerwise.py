"""On whole layers LARS and LAMB give timm's numbers to the last bit; what they keep is what a checkpoint expects."""

import copy

import pytest
import torch
from torch import nn

from fastssl.optim.lamb import Lamb
from fastssl.optim.lars import Lars

SHAPES = [(5, 3, 3, 3), (7, 5), (1, 1), (4, 3)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    made[3].data.zero_()  # its ratio is 1
    return made


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step - 2)


def assert_equal(own: list[nn.Parameter], other: list[nn.Parameter]) -> None:
    for a, b in zip(own, other, strict=True):
        assert torch.equal(a, b)


def build_pair(name: str, own: list[nn.Parameter], other: list[nn.Parameter], weight_decay: float, momentum: float):
    """Our optimizer of one list of parameters and timm's of the other."""
    from timm.optim.lamb import Lamb as TimmLamb
    from timm.optim.lars import Lars as TimmLars

    common = {"lr": 0.5, "weight_decay": weight_decay}
    if name == "lars":
        timm = TimmLars(other, **common, momentum=momentum, trust_coeff=0.02, always_adapt=True)
        return Lars(own, **common, momentum=momentum, trust_coefficient=0.02), timm
    betas = (momentum, 0.95)
    return Lamb(own, **common, betas=betas), TimmLamb(
        other, **common, betas=betas, always_adapt=True, max_grad_norm=None
    )


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_timm(name, weight_decay, momentum):
    own, other = parameters(), parameters()
    optimizer, timm = build_pair(name, own, other, weight_decay, momentum)
    for step in range(6):
        for params, stepped in ((own, optimizer), (other, timm)):
            set_grads(params, step)
            params[1].grad = torch.zeros_like(params[1]) if step == 3 else params[1].grad
            stepped.param_groups[0]["lr"] = 0.5 / (step + 1)
            stepped.step()
        assert_equal(own, other)
        for a, b in zip(own, other, strict=True):
            assert torch.equal(a.grad, b.grad)  # left as they were


def test_a_layer_without_a_gradient_is_left_alone():
    for optimizer_type in (Lars, Lamb):
        params = parameters()
        optimizer = optimizer_type(params, lr=0.1, weight_decay=0.1)
        set_grads(params, 0)
        params[0].grad = None
        optimizer.step()
        assert torch.equal(params[0], parameters()[0])
        assert not torch.equal(params[1], parameters()[1])
        assert params[0] not in optimizer.state


def test_lamb_corrects_each_parameter_for_the_steps_that_it_took():
    late, fresh = parameters()[:1], parameters()[:1]
    other = parameters()[1:2]
    optimizer, reference = Lamb(late + other, lr=0.1), Lamb(fresh, lr=0.1)
    set_grads(other, 0)
    optimizer.step()
    for params in (late, fresh):
        set_grads(params, 0)
    optimizer.step()
    reference.step()
    assert_equal(late, fresh)


def test_a_step_of_lamb_is_as_long_as_the_learning_rate_says():
    (w, *_) = parameters()
    before = w.detach().clone()
    set_grads([w], 0)
    Lamb([w], lr=0.01, weight_decay=0.1).step()
    assert (w.detach() - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-5)


@pytest.mark.parametrize("optimizer_type", [Lars, Lamb])
def test_a_saved_state_goes_on_with_the_same_steps(optimizer_type):
    own, other = parameters(), parameters()
    first, second = optimizer_type(own, lr=0.1), optimizer_type(other, lr=0.7)
    set_grads(own, 0)
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(own, other, strict=True):
        q.data.copy_(p.data)
    for params, optimizer in ((own, first), (other, second)):
        set_grads(params, 1)
        optimizer.step()
    assert_equal(own, other)


def test_state_is_named_and_shaped_as_that_of_torch():
    """A checkpoint gathers what has the parameter's shape, and keeps the rest as it is."""
    for ours, torchs in ((Lars, torch.optim.SGD), (Lamb, torch.optim.AdamW)):
        found = []
        for optimizer_type in (ours, torchs):
            params = parameters()
            momentum = {"momentum": 0.9} if optimizer_type in (Lars, torch.optim.SGD) else {}
            optimizer = optimizer_type(params, lr=0.1, **momentum)
            set_grads(params, 0)
            optimizer.step()
            states = optimizer.state_dict()["state"]
            found.append({(i, name): (x.shape, x.dtype) for i, state in states.items() for name, x in state.items()})
        assert found[0] == found[1]


@pytest.mark.parametrize("optimizer_type", [Lars, Lamb])
def test_a_flat_tensor_of_unknown_layers_is_refused(optimizer_type):
    flat = nn.Parameter(torch.ones(10))
    flat.grad = torch.ones(10)
    with pytest.raises(RuntimeError, match="bind_partitions"):
        optimizer_type([flat], lr=0.1).step()
    assert torch.equal(flat, torch.ones(10))
    optimizer_type([{"params": [flat], "adapt": False}], lr=0.1).step()  # elementwise: any tensor will do
    assert not torch.equal(flat, torch.ones(10))
