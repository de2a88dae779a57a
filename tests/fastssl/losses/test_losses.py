"""Losses on one process: the papers' formulas, gradients, known values, bounds, precision, refusals."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import collectives
from fastssl.losses import (
    LOSSES,
    DclConfig,
    DclwConfig,
    MioConfig,
    NtXentConfig,
    SigLipConfig,
    SpectralConfig,
    build_loss,
)
from kernels.similarity import chunked
from tests.helpers.pairs import ROWS

CONFIGS = {
    "naive": MioConfig(negative="naive", alignment_weight=1.0),
    "exp": MioConfig(negative="exp", temperature_positive=0.4, temperature_negative=0.3),
    "jensen": MioConfig(negative="jensen"),
    "jensen_per_anchor": MioConfig(negative="jensen", per_anchor=True, alignment_weight=0.5),
    "quadratic": MioConfig(negative="quadratic", temperature_positive=0.3),
    "softplus": MioConfig(negative="softplus", temperature_negative=0.2),
    "simclr": NtXentConfig(temperature=0.3),
    "dcl": DclConfig(temperature=0.3),
    "dclw": DclwConfig(temperature=0.3),
    "siglip": SigLipConfig(initial_inv_temperature=3.0, initial_bias=-1.0),
    "spectral": SpectralConfig(mu=3.0),
}
MIO_NAMES = [name for name, config in CONFIGS.items() if isinstance(config, MioConfig)]


def with_impl(name: str, impl: str):
    config = CONFIGS[name]
    return build_loss(type(config)(**{f.name: getattr(config, f.name) for f in fields(config)} | {"impl": impl}))


def projections(num: int = 6, width: int = 5, *, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, num, width, generator=generator, dtype=torch.float64).to(dtype)
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


def loss_and_grads(loss, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
    value = loss(z_a, z_b)
    return (value.detach(), *torch.autograd.grad(value, (z_a, z_b)))


# -- gradients


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dclw"])  # its weights are held fixed
def test_gradcheck(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", 3)
    assert torch.autograd.gradcheck(with_impl(name, impl).double(), projections(num=5))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dclw"])
def test_by_the_reference_it_is_twice_differentiable(name: str) -> None:
    assert torch.autograd.gradgradcheck(with_impl(name, "reference").double(), projections(num=3, width=3))


def test_gradcheck_of_what_siglip_learns() -> None:
    loss, (z_a, z_b) = build_loss(CONFIGS["siglip"]).double(), projections(num=5)
    names, parameters = zip(*loss.named_parameters(), strict=True)
    assert names == ("log_inv_temperature", "bias")

    def value(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, parameters, strict=True)), (z_a, z_b))

    assert torch.autograd.gradcheck(value, parameters)


def closed_form_grad(config: MioConfig, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient as it is derived on paper, row by row, pair by pair.

    dL/du_i = -(a_i/(N tau_p)) u_p + 1/(N(2N-2) tau_n) sum_{k in Neg(i)} w_ik u_k - (2 lambda/(N d)) u_p,
    dL/dz_i = (I - u_i u_i^T) (dL/du_i) / |z_i|.
    """
    z = torch.cat([z_a, z_b]).detach()
    n, d = z_a.shape
    u, tau_p, tau_n = z / z.norm(dim=1, keepdim=True), config.temperature_positive, config.temperature_negative
    partner = [(i + n) % (2 * n) for i in range(2 * n)]
    negatives = [[k for k in range(2 * n) if k not in (i, partner[i])] for i in range(2 * n)]
    x = (u @ u.T) / tau_n
    row_mean = torch.stack([x[i, negatives[i]].exp().mean() for i in range(2 * n)])
    c = 1 / (1 + row_mean)

    def weight(i: int, k: int) -> Tensor:
        if config.negative in ("naive", "softplus"):
            return torch.sigmoid(x[i, k])
        if config.negative == "quadratic":
            return 1 / 2 + x[i, k] / 4
        if config.negative == "exp":
            return x[i, k].exp()
        return x[i, k].exp() * ((c[i] + c[k]) / 2 if config.per_anchor else 1 / (1 + row_mean.mean()))

    grad = torch.empty_like(z)
    for i in range(2 * n):
        u_p = u[partner[i]]
        a = 1 - torch.sigmoid(u[i] @ u_p / tau_p) if config.negative == "naive" else 1.0
        du = -(a / (n * tau_p)) * u_p - (2 * config.alignment_weight / (n * d)) * u_p
        du = du + sum(weight(i, k) * u[k] for k in negatives[i]) / (n * (2 * n - 2) * tau_n)
        grad[i] = (du - u[i] * (u[i] @ du)) / z[i].norm()
    return grad[:n], grad[n:]


@pytest.mark.parametrize("name", MIO_NAMES)
def test_autograd_is_the_closed_form(name: str) -> None:
    z_a, z_b = projections()
    _, *actual = loss_and_grads(build_loss(CONFIGS[name]), z_a, z_b)
    for ours, expected in zip(actual, closed_form_grad(CONFIGS[name], z_a, z_b), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_upstream_gradient_scales_and_the_graph_can_be_retained(name: str) -> None:
    z_a, z_b = projections()
    value = build_loss(CONFIGS[name])(z_a, z_b)
    once = torch.autograd.grad(value, z_a, retain_graph=True)[0]
    again = torch.autograd.grad(value, z_a, retain_graph=True)[0]
    scaled = torch.autograd.grad(-3.5 * value, z_a)[0]
    assert torch.equal(once, again)
    torch.testing.assert_close(scaled, -3.5 * once)


# -- values


def naive_with_loops(z_a: Tensor, z_b: Tensor, tau: float, alignment_weight: float) -> float:
    z = torch.cat([z_a, z_b])
    n, u = len(z_a), [row / row.norm() for row in z]
    positive = negative = 0.0
    for i in range(2 * n):
        for k in range(2 * n):
            s = float(u[i] @ u[k])
            if k == (i + n) % (2 * n):
                positive += math.log(1 + math.exp(-s / tau))
            elif k != i:
                negative += math.log(1 + math.exp(s / tau))
    alignment = sum(float(((u[i] - u[i + n]) ** 2).mean()) for i in range(n)) / n
    return positive / (2 * n) + negative / (2 * n * (2 * n - 2)) + alignment_weight * alignment


def test_naive_is_the_formula_with_loops() -> None:
    z_a, z_b = projections()
    expected = naive_with_loops(z_a.detach(), z_b.detach(), 0.5, 1.0)
    assert build_loss(CONFIGS["naive"])(z_a, z_b).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_nt_xent_is_the_cross_entropy_over_all_other_rows(temperature: float) -> None:
    z_a, z_b = projections()
    u = F.normalize(torch.cat([z_a, z_b]), dim=1)
    logits = (u @ u.T / temperature).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    expected = F.cross_entropy(logits, (torch.arange(12) + 6) % 12)
    value, *grads = loss_and_grads(build_loss(NtXentConfig(temperature=temperature)), z_a, z_b)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (z_a, z_b)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def with_loops(name: str, z_a: Tensor, z_b: Tensor) -> float:
    """DCL, DCLW, SigLIP and the spectral loss as their papers write them, term by term."""
    n, tau, t, b, mu = len(z_a), 0.3, 3.0, -1.0, 3.0
    views = [[row / row.norm() for row in z] for z in (z_a, z_b)]
    if name == "siglip":
        labels = [[1 if i == j else -1 for j in range(n)] for i in range(n)]
        logits = [[t * float(views[0][i] @ views[1][j]) + b for j in range(n)] for i in range(n)]
        return sum(math.log(1 + math.exp(-labels[i][j] * logits[i][j])) for i in range(n) for j in range(n)) / n
    if name == "spectral":
        a, b_ = ([row * min(1, math.sqrt(mu) / float(row.norm())) for row in z] for z in (z_a, z_b))
        positive = sum(float(a[i] @ b_[i]) for i in range(n))
        negative = sum(float(a[i] @ b_[j]) ** 2 for i in range(n) for j in range(n) if i != j)
        return (-2 / n * positive + negative / (n * (n - 1))) / mu
    total, s_p = 0.0, [float(views[0][i] @ views[1][i]) for i in range(n)]
    partition = sum(math.exp(s / 0.5) for s in s_p)
    for v, i in itertools.product(range(2), range(n)):
        weight = 2 - n * math.exp(s_p[i] / 0.5) / partition if name == "dclw" else 1.0
        others = [float(views[v][i] @ views[w][k]) for w in range(2) for k in range(n) if k != i]
        total += -weight * s_p[i] / tau + math.log(sum(math.exp(s / tau) for s in others))
    return total / (2 * n)


@pytest.mark.parametrize("name", ["dcl", "dclw", "siglip", "spectral"])
def test_the_others_are_their_papers_formulas_with_loops(name: str) -> None:
    z_a, z_b = (z.detach() for z in projections())
    num_shortened = sum(float(row.norm()) > math.sqrt(3) for row in torch.cat([z_a, z_b]))
    assert 0 < num_shortened < 12  # by the spectral loss
    rel = 1e-7 if name == "siglip" else 1e-13  # siglip's parameters are made in fp32
    actual = build_loss(CONFIGS[name]).double()(z_a, z_b).item()
    assert actual == pytest.approx(with_loops(name, z_a, z_b), rel=rel)


def test_siglip_starts_at_the_papers_parameters() -> None:
    parameters = {name: parameter.item() for name, parameter in build_loss(SigLipConfig()).named_parameters()}
    assert parameters == pytest.approx({"log_inv_temperature": math.log(10), "bias": -10}, rel=1e-7)


LOG2, E2 = math.log(2), math.exp(2)
SP_PLUS, SP_MINUS = math.log1p(math.exp(2)), math.log1p(math.exp(-2))
# At temperature .5: all similarities 0 (random at high D) | partners 1, others 0 (ideal) | all 1 (collapse).
KNOWN_VALUES = {
    "naive": (2 * LOG2, SP_MINUS + LOG2, SP_MINUS + SP_PLUS),  # 1.386, .820, 2.254
    "exp": (1.0, -1.0, -2 + E2),
    "jensen": (LOG2, -2 + LOG2, -2 + math.log1p(E2)),
    "quadratic": (LOG2, -2 + LOG2, -2 + LOG2 + 1 + 1 / 2),
    "softplus": (LOG2, -2 + LOG2, -2 + SP_PLUS),
}


@pytest.mark.parametrize("negative", KNOWN_VALUES)
def test_known_values(negative: str) -> None:
    loss, rows = build_loss(MioConfig(negative=negative)), torch.eye(16, dtype=torch.float64)
    same = rows[:1].expand(8, 16)
    values = [loss(*views).item() for views in ((rows[:8], rows[8:]), (rows[:8], rows[:8]), (same, same))]
    assert values == pytest.approx(KNOWN_VALUES[negative], rel=1e-13)


def test_known_values_of_nt_xent() -> None:
    loss, rows = build_loss(NtXentConfig()), torch.eye(16, dtype=torch.float64)
    assert loss(rows[:8], rows[8:]).item() == pytest.approx(math.log(15))
    assert loss(rows[:8], rows[:8]).item() == pytest.approx(math.log(E2 + 14) - 2)


def test_known_values_of_the_others() -> None:
    rows = torch.eye(16, dtype=torch.float64)
    orthogonal, ideal, collapse = (rows[:8], rows[8:]), (rows[:8], rows[:8]), (rows[:1].expand(8, 16),) * 2
    known = {
        DclConfig(temperature=0.5): (math.log(14), -2 + math.log(14), math.log(14)),
        DclwConfig(temperature=0.5): (math.log(14), -2 + math.log(14), math.log(14)),
        SigLipConfig(initial_inv_temperature=2.0, initial_bias=0.0): (
            8 * LOG2,
            SP_MINUS + 7 * LOG2,
            SP_MINUS + 7 * SP_PLUS,
        ),
        SpectralConfig(): (0.0, -2.0, -1.0),
    }
    for config, expected in known.items():
        values = [build_loss(config).double()(*views).item() for views in (orthogonal, ideal, collapse)]
        assert values == pytest.approx(expected, rel=1e-7, abs=1e-12), config


def test_random_projections_start_near_the_known_value() -> None:
    z_a, z_b = projections(256, 512, dtype=torch.float32)
    assert build_loss(MioConfig(negative="naive"))(z_a, z_b).item() == pytest.approx(1.386, abs=0.01)


# -- bounds


def test_negative_terms_bound_the_softplus_from_above() -> None:
    """mean sp(x) <= log(1 + mean e^x) <= mean e^x, per anchor between the first two; sp(x) <= log 2 + x/2 + x^2/8."""
    forms = [MioConfig(negative="softplus"), MioConfig(negative="jensen", per_anchor=True)]
    forms += [MioConfig(negative="jensen"), MioConfig(negative="exp")]
    for seed in range(10):
        views = projections(seed=seed)
        values = [build_loss(form)(*views).item() for form in forms]
        assert values == sorted(values)
        assert values[0] <= build_loss(MioConfig(negative="quadratic"))(*views).item()


def two_symbol_loss(critic: Tensor, joint: Tensor, negative: str) -> float:
    """The population loss of a symmetric critic table over pairs of symbols."""
    marginals = joint.sum(1)[:, None] * joint.sum(0)
    positive = F.softplus(-critic) if negative == "naive" else -critic
    means = {"naive": F.softplus(critic), "exp": critic.exp(), "jensen": critic.exp()}[negative]
    mean = float((marginals * means).sum())
    return float((joint * positive).sum()) + (math.log1p(mean) if negative == "jensen" else mean)


def test_bounds_hold_for_any_critic_and_are_tight_at_the_best() -> None:
    joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    marginals = torch.full((2, 2), 0.25, dtype=torch.float64)
    ratio, middle = joint / marginals, (joint + marginals) / 2
    kl = float((joint * ratio.log()).sum())
    jsd = float((joint * (joint / middle).log()).sum() + (marginals * (marginals / middle).log()).sum()) / 2
    limits = {"naive": jsd, "exp": kl, "jensen": kl}
    for (negative, limit), seed in itertools.product(limits.items(), range(20)):
        loss = build_loss(MioConfig(negative=negative))
        critic = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss.bound_nats(two_symbol_loss(critic, joint, negative)) <= limit
        if negative != "jensen":  # log(1 + mean) stays above log(mean): never tight
            assert loss.bound_nats(two_symbol_loss(ratio.log(), joint, negative)) == pytest.approx(limit)


def test_forms_without_a_bound_say_so() -> None:
    assert build_loss(MioConfig(negative="softplus")).bound_nats(1.0) is None
    assert build_loss(MioConfig(negative="quadratic")).bound_nats(1.0) is None
    assert build_loss(CONFIGS["exp"]).bound_nats(1.0) is None  # two temperatures
    for config in (NtXentConfig(), DclConfig(), DclwConfig(), SigLipConfig(), SpectralConfig()):
        assert build_loss(config).bound_nats(1.0) is None


# -- precision and memory layout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision_inputs_under_autocast_are_computed_in_fp32(name: str, dtype: torch.dtype) -> None:
    z_a, z_b = projections(16, 32, dtype=dtype)
    loss = build_loss(CONFIGS[name])
    expected = loss_and_grads(loss, *(z.detach().double().requires_grad_() for z in (z_a, z_b)))
    with torch.autocast("cpu", torch.bfloat16):
        value, *grads = loss_and_grads(loss, z_a, z_b)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected[0].item(), rel=2e-6, abs=2e-6)
    for ours, exact in zip(grads, expected[1:], strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= (torch.finfo(dtype).eps + 1e-5) * exact.norm()


LOWEST = 0.0167  # 1/60, rounded up
AT_LOWEST = {
    "naive": MioConfig(negative="naive", temperature_positive=1e-3, temperature_negative=1e-3),
    "exp": MioConfig(negative="exp", temperature_positive=LOWEST, temperature_negative=LOWEST),
    "jensen": MioConfig(negative="jensen", temperature_negative=LOWEST),
    "jensen_per_anchor": MioConfig(negative="jensen", per_anchor=True, temperature_negative=LOWEST),
    "quadratic": MioConfig(negative="quadratic", temperature_positive=1e-3, temperature_negative=1e-3),
    "softplus": MioConfig(negative="softplus", temperature_positive=1e-3, temperature_negative=1e-3),
    "simclr": NtXentConfig(temperature=LOWEST),
    "dcl": DclConfig(temperature=LOWEST),
    "dclw": DclwConfig(temperature=LOWEST),
    "siglip": SigLipConfig(initial_inv_temperature=1e3, initial_bias=-1e3),
    "spectral": SpectralConfig(mu=1e-6),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", AT_LOWEST)
def test_the_lowest_temperature_gives_finite_numbers_near_those_of_fp64(name: str, rows: str) -> None:
    views = ROWS[rows](2, 32, 8)
    found = {}
    for dtype in (torch.float32, torch.float64):
        z_a, z_b = (z.to(dtype).requires_grad_() for z in views)
        found[dtype] = loss_and_grads(build_loss(AT_LOWEST[name]), z_a, z_b)
    scale = float(found[torch.float64][0].abs())
    for ours, exact in zip(*found.values(), strict=True):
        assert ours.isfinite().all()
        # s is off by up to 1e-7, s / temperature by 1e-4 at 1e-3, and a gradient by that fraction of its largest part;
        # rows that coincide pull along themselves: what the projection leaves is rounding, of the size of the loss.
        atol = 1e-3 * float(exact.abs().max()) + 1e-6 * scale + 1e-3
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
def test_non_contiguous_inputs_and_no_grad(name: str) -> None:
    z_a, z_b = projections()
    loss = build_loss(CONFIGS[name])
    value, *grads = loss_and_grads(loss, z_a, z_b)
    strided = [z.detach().T.contiguous().T.requires_grad_() for z in (z_a, z_b)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(loss_and_grads(loss, *strided), (value, *grads))
    with torch.no_grad():
        silent = loss(z_a, z_b)
    assert not silent.requires_grad
    assert torch.equal(silent, value)


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_compile_takes_it_as_one_graph(name: str) -> None:
    z_a, z_b = projections()
    loss = build_loss(CONFIGS[name])
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(*(loss_and_grads(x, z_a, z_b) for x in (compiled, loss)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


# -- configuration and refusals


def test_every_loss_is_built_from_its_default_config_by_name() -> None:
    for name, (config_type, module_type) in LOSSES.items():
        config = config_type()
        assert config.name == name == fields(config)[0].default
        assert type(build_loss(config, 8)) is module_type


@pytest.mark.parametrize(
    ("config_type", "settings", "message"),
    [
        (
            MioConfig,
            {"negative": "hinge"},
            "negative must be one of naive, exp, jensen, quadratic, softplus",
        ),
        (MioConfig, {"per_anchor": True}, "loss.per_anchor needs loss.negative=jensen"),
        (MioConfig, {"temperature_positive": 0.0}, r"temperature_positive must be in \[1e-4, 1e4\], not 0.0"),
        (MioConfig, {"temperature_negative": math.nan}, r"temperature_negative must be in \[1e-4, 1e4\], not nan"),
        (
            MioConfig,
            {"temperature_negative": 0.016},
            r"\[0\.0167, 1e4\] for loss.negative exp, not 0\.016",
        ),
        (MioConfig, {"alignment_weight": -1.0}, r"alignment_weight must be in \[0, 1e6\]"),
        (
            MioConfig,
            {"negative": "jensen", "temperature_negative": 0.01},
            r"\[0\.0167, 1e4\] for loss.negative jensen",
        ),
        (MioConfig, {"impl": "cuda"}, "impl must be one of auto, fused, chunked, reference, not 'cuda'"),
        (NtXentConfig, {"temperature": -1.0}, r"temperature must be in \[0\.0167, 1e4\]"),
        (NtXentConfig, {"temperature": 0.01}, r"temperature must be in \[0\.0167, 1e4\], not 0\.01"),
        (NtXentConfig, {"impl": "cuda"}, "impl must be one of auto"),
        (DclConfig, {"temperature": 0.01}, r"temperature must be in \[0\.0167, 1e4\]"),
        (DclwConfig, {"temperature": math.inf}, r"temperature must be in \[0\.0167, 1e4\]"),
        (DclConfig, {"impl": "cuda"}, "impl must be one of auto"),
        (SigLipConfig, {"initial_inv_temperature": 0.0}, r"initial_inv_temperature must be in \[1e-4, 1e4\]"),
        (SigLipConfig, {"initial_bias": math.inf}, r"initial_bias must be in \[-1e4, 1e4\], not inf"),
        (SigLipConfig, {"impl": "cuda"}, "impl must be one of auto"),
        (SpectralConfig, {"mu": 0.0}, r"mu must be in \[1e-6, 1e6\]"),
        (SpectralConfig, {"impl": "cuda"}, "impl must be one of auto"),
    ],
)
def test_bad_settings_name_their_key(config_type: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_type(**settings)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (4, 2)), r"all views must have the same shape \[B, D\]"),
        (((4, 3), (3, 3)), r"all views must have the same shape \[B, D\]"),
        (((4, 3, 1), (4, 3, 1)), r"all views must have the same shape \[B, D\]"),
        (((1, 3), (1, 3)), "at least 2 samples, got 1"),
    ],
)
@pytest.mark.parametrize("name", ["exp", "simclr", "siglip", "spectral"])
def test_bad_shapes_are_refused(name: str, shapes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(CONFIGS[name])(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="the same floating dtype"):
        build_loss(CONFIGS["exp"])(torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float64))


# -- more than two views


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("siglip", "dclw", "spectral")])
def test_three_views_are_every_pair_of_them(name: str) -> None:
    """Against the equations on explicit rows: the positives of each pair, the negatives of other samples."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    loss = build_loss(CONFIGS[name])
    u = torch.nn.functional.normalize(z, dim=2)
    s = u.flatten(0, 1) @ u.flatten(0, 1).T
    sample = torch.arange(12) % 4
    negative = sample[:, None] != sample
    positive = ~negative & ~torch.eye(12, dtype=torch.bool)
    assert positive.sum(1).tolist() == [2] * 12
    config = loss.config
    if name in ("simclr", "dcl"):
        x = s / config.temperature
        log_sums = torch.logsumexp(x.masked_fill(~negative, -math.inf), 1)[:, None].expand_as(x)[positive]
        terms = log_sums - x[positive]
        expected = (torch.nn.functional.softplus(terms) if name == "simclr" else terms).mean()
    else:
        p, x = s[positive] / config.temperature_positive, s / config.temperature_negative
        softplus = torch.nn.functional.softplus
        first = softplus(-p).mean() if config.negative == "naive" else -p.mean()
        second = {
            "naive": lambda: softplus(x[negative]).mean(),
            "softplus": lambda: softplus(x[negative]).mean(),
            "exp": lambda: x[negative].exp().mean(),
            "jensen": lambda: torch.log1p(x[negative].exp().mean()),
            "quadratic": lambda: (math.log(2) + x / 2 + x**2 / 8)[negative].mean(),
        }[config.negative]()
        if config.per_anchor:
            second = torch.log1p((x.exp() * negative).sum(1) / negative.sum(1)).mean()
        expected = first + second
        distances = [(u[v] - u[w]).square().mean() for v, w in ((0, 1), (0, 2), (1, 2))]
        expected = expected + config.alignment_weight * sum(distances) / 3
    torch.testing.assert_close(loss(*z), expected, rtol=1e-12, atol=1e-12)


def test_siglip_takes_two_views() -> None:
    with pytest.raises(TypeError):
        build_loss(CONFIGS["siglip"])(*torch.zeros(3, 4, 5))


# -- the collectives without a process group


def test_collectives_work_without_a_process_group() -> None:
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    (block,) = collectives.EXCHANGE.blocks(x)
    assert torch.equal(block, x.detach())
    assert not block.requires_grad
    collectives.barrier()
    mean = collectives.global_mean(x)
    assert torch.equal(mean, x)
    assert torch.equal(torch.autograd.grad(mean.sum(), x)[0], torch.ones(3, 2))
    with pytest.raises(ValueError, match="floating dtype"):
        collectives.all_mean_(torch.zeros(2, dtype=torch.int64))
