"""BYOL, SimSiam, Barlow Twins, VICReg and TiCo on one process: equations with loops, gradients, views, refusals."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastssl.losses import (
    BarlowTwinsConfig,
    ByolConfig,
    LinearByolConfig,
    LossConfig,
    SimSiamConfig,
    TiCoConfig,
    VicRegConfig,
    build_loss,
)

NUM, WIDTH = 8, 3
CONFIGS: dict[str, LossConfig] = {
    "byol": ByolConfig(predictor_hidden=6),
    "linear_byol": LinearByolConfig(),
    "simsiam": SimSiamConfig(predictor_hidden=6),
    "barlow_twins": BarlowTwinsConfig(redundancy_weight=0.3),
    "vicreg": VicRegConfig(),
    "tico": TiCoConfig(covariance_weight=3.0),
}
TARGETS = ("byol", "linear_byol", "tico")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_loss(CONFIGS[name], WIDTH).double()


def draw(num_views: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_views, NUM, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def value_of(name: str, loss: nn.Module, z: Tensor | list[Tensor], targets: Tensor) -> Tensor:
    return loss(*z, targets=list(targets)) if name in TARGETS else loss(*z)


def cosine(p: Tensor, t: Tensor) -> float:
    return float(torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(p, t, strict=True)]).mean())


def with_loops(name: str, loss: nn.Module, z: Tensor, targets: Tensor) -> float:
    """Each pair of views by its paper's equation, and their mean."""
    z, targets, num_views = z.detach(), targets.detach(), len(z)
    unordered = [(v, w) for v in range(num_views) for w in range(v + 1, num_views)]
    if name in ("byol", "linear_byol", "simsiam"):
        with torch.no_grad():
            p = loss.predictor(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        if name == "simsiam":
            return -sum(cosine(p[v], z[w]) + cosine(p[w], z[v]) for v, w in unordered) / (2 * len(unordered))
        pairs = [(v, w) for v in range(num_views) for w in range(len(targets)) if v != w]
        return 2 * sum(2 - 2 * cosine(p[v], targets[w]) for v, w in pairs) / len(pairs)
    if name == "tico":
        u = z / z.norm(dim=2, keepdim=True)
        c = 0.1 * sum(torch.outer(row, row) for row in u.flatten(0, 1)) / (num_views * NUM)
        pairs = [(v, w) for v in range(num_views) for w in range(len(targets)) if v != w]
        repulsion = sum(float(row @ c @ row) for row in u.flatten(0, 1)) / (num_views * NUM)
        return 1 - sum(cosine(z[v], targets[w]) for v, w in pairs) / len(pairs) + 3.0 * repulsion
    total = 0.0
    for v, w in unordered:
        a, b = z[v], z[w]
        if name == "barlow_twins":
            x, y = ((m - m.mean(0)) / (m.var(0, unbiased=False) + 1e-5).sqrt() for m in (a, b))
            c = x.T @ y / NUM
            total += sum(float((1 - c[d, d]) ** 2) for d in range(WIDTH))
            total += 0.3 * sum(float(c[d, e] ** 2) for d in range(WIDTH) for e in range(WIDTH) if d != e)
            continue
        total += 25 * float(((a - b) ** 2).mean())
        for m in (a, b):
            cov = torch.cov(m.T)
            total += 25 / 2 * sum(max(0.0, 1 - math.sqrt(cov[d, d] + 1e-4)) for d in range(WIDTH)) / WIDTH
            total += sum(float(cov[d, e] ** 2) for d in range(WIDTH) for e in range(WIDTH) if d != e) / WIDTH
    return total / len(unordered)


@pytest.mark.parametrize("num_views", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_its_papers_equation_over_every_two_views(name: str, num_views: int) -> None:
    loss, z, targets = build(name), draw(num_views), draw(seed=1)
    expected = with_loops(name, loss, z, targets)
    assert value_of(name, loss, z, targets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck_with_the_targets_held_fixed(name: str) -> None:
    loss, z, targets = build(name), draw(), draw(seed=1)
    if name == "tico":
        value_of(name, loss, z, targets)
        loss.eval()
        loss.moment.momentum = 1.0  # C held fixed
    if name == "simsiam":  # its targets are its own rows: of a second z, without gradient
        fixed, predict = z.detach(), loss.predictor

        def value(z: Tensor) -> Tensor:
            p = predict(z.flatten(0, 1)).unflatten(0, z.shape[:2])
            return -(torch.cosine_similarity(p, fixed.flip(0), dim=2)).mean()

        ours, theirs = (torch.autograd.grad(x, z)[0] for x in (loss(*z), value(z)))
        torch.testing.assert_close(ours, theirs)
        return
    assert torch.autograd.gradcheck(lambda z: value_of(name, loss, z, targets), z)


@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision_inputs_under_autocast_give_fp32(name: str) -> None:
    torch.manual_seed(0)
    z, targets = draw(dtype=torch.bfloat16), draw(seed=1, dtype=torch.bfloat16)
    loss = build_loss(CONFIGS[name], WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        value = value_of(name, loss, z, targets)
    exact = value_of(name, build(name), z.detach().double(), targets.double())
    assert value.dtype == torch.float32
    rel = 0.03 if hasattr(loss, "predictor") else 1e-5  # the predictor runs in bf16, as the network does
    assert value.item() == pytest.approx(exact.item(), rel=rel, abs=rel)


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_compile_takes_it_as_one_graph(name: str) -> None:
    z, targets = [view.detach().requires_grad_() for view in draw()], draw(seed=1).detach()
    torch.compiler.reset()
    compiled = torch.compile(build(name), fullgraph=True, backend="aot_eager")
    ours, expected = (value_of(name, loss, z, targets) for loss in (compiled, build(name)))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, z) for value in (ours, expected)))


def test_known_values() -> None:
    for name, ideal in (("byol", 0.0), ("simsiam", -1.0)):
        loss = build(name)
        loss.predictor = nn.Identity()
        same = draw()[:1].expand(2, NUM, WIDTH)
        assert value_of(name, loss, same, same).item() == pytest.approx(ideal, abs=1e-12)
    collapse = torch.ones(2, NUM, WIDTH, dtype=torch.float64)
    assert build("vicreg")(*collapse).item() == pytest.approx(25 * 0.99)
    assert build("barlow_twins")(*collapse).item() == pytest.approx(WIDTH)


def test_predictors_have_their_papers_widths() -> None:
    for config, hidden in ((ByolConfig(), 4096), (SimSiamConfig(), 512)):
        linears = [m for m in build_loss(config, 16).predictor if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in linears] == [(16, hidden), (hidden, 16)]
    assert isinstance(build_loss(LinearByolConfig(), 16).predictor, nn.Linear)


@pytest.mark.parametrize(
    ("config_type", "settings", "message"),
    [
        (ByolConfig, {"predictor_hidden": 0}, r"predictor_hidden must be in \[1, 65536\], not 0"),
        (ByolConfig, {"target_momentum": 1.5}, r"target_momentum must be in \[0, 1\], not 1.5"),
        (LinearByolConfig, {"target_momentum": -1.0}, "target_momentum"),
        (SimSiamConfig, {"predictor_hidden": -1}, "predictor_hidden"),
        (BarlowTwinsConfig, {"redundancy_weight": -1.0}, r"redundancy_weight must be in \[0, 1e6\], not -1"),
        (VicRegConfig, {"variance_weight": math.nan}, r"variance_weight must be in \[0, 1e6\]"),
        (TiCoConfig, {"covariance_weight": math.inf}, "covariance_weight"),
        (TiCoConfig, {"moment_momentum": 1.0}, r"moment_momentum must be in \[0, 1\)"),
        (TiCoConfig, {"target_momentum": 2.0}, "target_momentum"),
    ],
)
def test_bad_settings_name_their_key(config_type: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_type(**settings)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sample_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        value_of(name, build(name), draw()[:, :1], draw()[:, :1])
