"""The Hessian of every loss on a small network in fp64, against differences of gradients and against its exact self."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastssl.analysis.curvature import HELD, LossHessian, held_fixed, twice_differentiable
from fastssl.analysis.hessian import Curve, HessianSettings, color_of, density_moments, draw_densities, find_spectrum
from fastssl.analysis.lanczos import spectral_density
from fastssl.analysis.source import hold_still
from fastssl.config import build_config
from fastssl.errors import ConfigError, UserError
from fastssl.losses import LOSSES, build_loss
from fastssl.models.objective import Objective

WIDTH = 4
SETTINGS: dict[str, dict] = {
    **{
        f"mio {form}": {"name": "mio", "negative": form} for form in ("naive", "exp", "jensen", "quadratic", "softplus")
    },
    "mio per anchor": {"name": "mio", "negative": "jensen", "per_anchor": True, "alignment_weight": 0.5},
    "siglip": {"name": "siglip", "initial_inv_temperature": 3.0, "initial_bias": -1.0},
    "byol": {"name": "byol", "predictor_hidden": 5},
    "simsiam": {"name": "simsiam", "predictor_hidden": 5},
    **{name: {"name": name} for name in LOSSES if name not in ("mio", "siglip", "byol", "simsiam")},
}
# What these hold is made of the weights themselves: a difference of gradients moves it.
OF_THE_WEIGHTS = ("simsiam", "dclw", "tico")


class SmallModel(nn.Module):
    """Images to projections: 108 parameters with batch norm, called as `TwoViewModel` is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WIDTH, bias=False))

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        z = list(self.layers(torch.cat([view.flatten(1) for view in views])).chunk(len(views)))
        return z, z


def hessian_of(name: str, *, differentiable: bool = True) -> LossHessian:
    """Of a loss on two batches of eight; its target, its moment and its predictor are not where they began."""
    cfg = build_config({"loss": SETTINGS[name], "model": {"projector_dim": WIDTH}})
    loss_config = twice_differentiable(cfg).loss if differentiable else cfg.loss
    torch.manual_seed(0)
    objective = Objective(SmallModel(), build_loss(loss_config, WIDTH)).double()  # pyright: ignore[reportArgumentType]
    batches = [[torch.randn(8, 10).double() for _ in range(2)] for _ in range(2)]
    objective.train()
    objective(batches[1])  # a moment takes one batch in
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.mul_(1.2)  # away from the target
    hold_still(objective)
    return LossHessian(objective, batches)


def gradient_at(hessian: LossHessian, weights: Tensor) -> Tensor:
    nn.utils.vector_to_parameters(weights, hessian.parameters)
    return hessian.loss_and_gradient()[1]


def exact(hessian: LossHessian) -> Tensor:
    """H [P, P], a product a column."""
    return torch.stack([hessian.product(column) for column in torch.eye(hessian.size).double()], 1)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in OF_THE_WEIGHTS])
def test_a_product_is_a_difference_of_the_gradients_that_training_uses(name: str) -> None:
    hessian, trained = hessian_of(name), hessian_of(name, differentiable=False)
    weights = nn.utils.parameters_to_vector(hessian.parameters).detach()
    torch.testing.assert_close(hessian.loss_and_gradient()[1], gradient_at(trained, weights), rtol=0, atol=1e-13)
    v = torch.randn(hessian.size, generator=torch.Generator().manual_seed(1)).double()
    h = 1e-5  # the error is h^2 times a third derivative, and 1e-16/h of rounding
    difference = (gradient_at(trained, weights + h * v) - gradient_at(trained, weights - h * v)) / (2 * h)
    product = hessian.product(v)
    assert product.norm() > 1e-3
    assert float((product - difference).norm() / product.norm()) < 1e-6


@pytest.mark.parametrize("name", OF_THE_WEIGHTS)
def test_what_is_held_leaves_a_symmetric_matrix(name: str) -> None:
    hessian = hessian_of(name)
    v, w = torch.randn(2, hessian.size, generator=torch.Generator().manual_seed(1)).double()
    both = float(w @ hessian.product(v)), float(v @ hessian.product(w))
    assert abs(both[0]) > 1e-3
    assert both[0] == pytest.approx(both[1], rel=1e-10)
    assert name in HELD


@pytest.mark.parametrize("name", ["byol", "minc", "tico"])
def test_no_product_changes_a_buffer_or_a_weight(name: str) -> None:
    hessian = hessian_of(name)
    before = {key: value.clone() for key, value in hessian.objective.state_dict().items()}
    first = hessian.product(torch.ones(hessian.size).double())
    assert torch.equal(first, hessian.product(torch.ones(hessian.size).double()))
    for key, value in hessian.objective.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_dropout_is_the_same_in_every_product() -> None:
    hessian = hessian_of("mio exp")
    hessian.objective.model.layers.insert(2, nn.Dropout(0.2))  # pyright: ignore[reportCallIssue]
    state = torch.get_rng_state()
    v = torch.ones(hessian.size).double()
    assert torch.equal(hessian.product(v), hessian.product(v))
    assert torch.equal(torch.get_rng_state(), state)


def test_where_a_projection_is_zero_there_is_no_hessian() -> None:
    hessian = hessian_of("mio exp")
    with torch.no_grad():
        hessian.parameters[-1].zero_()  # the last layer
    with pytest.raises(UserError, match="not finite"):
        hessian.product(torch.ones(hessian.size).double())


@pytest.fixture(scope="module")
def small() -> tuple[LossHessian, Tensor]:
    hessian = hessian_of("mio exp")
    hessian.batches = hessian.batches[:1]
    matrix = exact(hessian)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-12 * float(matrix.norm()))
    return hessian, matrix


def test_the_largest_eigenvalues_are_those_of_the_exact_hessian(small: tuple[LossHessian, Tensor]) -> None:
    _, matrix = small
    eigenvalues = torch.linalg.eigvalsh(matrix).flip(0)[:4].numpy()
    settings = HessianSettings(num_probes=1, num_iterations=60, top_k=4)
    found = find_spectrum(lambda v: matrix @ v, matrix[0], settings, say=lambda _: None)
    assert found.is_converged.all()
    # Weyl: an eigenvalue lies within the residual; of a Rayleigh quotient the error is its square over the gap.
    gaps = -np.diff(np.append(eigenvalues, torch.linalg.eigvalsh(matrix).flip(0)[4]))
    bound = np.minimum(found.residuals, found.residuals**2 / gaps.min()) + 1e-12
    assert (np.abs(found.eigenvalues - eigenvalues) <= bound).all()
    settings = HessianSettings(num_probes=1, num_iterations=5)
    few = find_spectrum(lambda v: matrix @ v, matrix[0], settings, say=lambda _: None)
    assert not few.is_converged.all()  # five products do not find five eigenvalues
    assert few.trace[1] is None


def test_ratios_are_those_of_the_eigenvalues_and_have_no_scale() -> None:
    """Of a diagonal matrix, random signs give the trace exactly."""
    settings = HessianSettings(num_probes=2, num_iterations=5, top_k=2)
    diagonal = torch.tensor([-2.0, 1.0, 3.0, 6.0, 8.0]).double()
    for scale in (1.0, 1e-6):
        found = find_spectrum(lambda v, scale=scale: scale * diagonal * v, diagonal, settings, say=lambda _: None)
        assert found.largest_over_trace == pytest.approx(8 / 16, rel=1e-12)
        assert found.smallest_over_largest == pytest.approx(2 / 8, rel=1e-12)
    zero = find_spectrum(lambda v: 0 * v, diagonal, replace(settings, top_k=1), say=lambda _: None)
    assert (zero.largest_over_trace, zero.smallest_over_largest) == (None, None)


def test_a_plot_has_a_colour_for_each_run_and_a_shade_for_each_step(tmp_path) -> None:
    from matplotlib.colors import to_rgb

    krylov = find_spectrum(lambda v: v, torch.ones(4), HessianSettings(num_iterations=5, top_k=1), say=lambda _: None)
    of_curve = {"density": spectral_density(krylov.krylovs), "eigenvalues": krylov.eigenvalues}
    curves = [Curve(label=f"{run} {k}", run=run, shade=k / 3, **of_curve) for run in (0, 1) for k in (1, 2, 3)]
    colors = [color_of(curve) for curve in curves]
    assert [*colors[2], *colors[5]] == pytest.approx([*to_rgb("C0"), *to_rgb("C1")])
    assert len(set(colors)) == 6
    assert min(colors[0]) > min(colors[1]) > min(colors[2])  # an earlier step is paler
    draw_densities(curves, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def test_trace_and_moments_are_those_of_the_exact_hessian(small: tuple[LossHessian, Tensor]) -> None:
    """For signs q the variance of q^T A q is 2 sum_{i != j} A_ij^2 (Hutchinson 1990): held to five deviations."""
    hessian, matrix = small
    num_probes = 30
    settings = HessianSettings(num_probes=num_probes, num_iterations=5, top_k=1)
    found = find_spectrum(lambda v: matrix @ v, matrix[0], settings, say=lambda _: None)
    powers = list(itertools.accumulate([matrix] * 4, torch.matmul))
    for power, moment in zip(powers, density_moments(found.krylovs), strict=True):
        deviation = float((2 * (power - power.diagonal().diag()).square().sum() / num_probes).sqrt())
        assert abs(hessian.size * moment - float(power.trace())) <= 5 * deviation
    trace, error = found.trace
    assert error is not None
    assert trace == pytest.approx(hessian.size * density_moments(found.krylovs)[0], rel=1e-10)
    deviation = float((2 * (matrix - matrix.diagonal().diag()).square().sum() / num_probes).sqrt())
    assert 0.5 * deviation < error < 2 * deviation


def test_every_direction_as_a_start_gives_the_moments_exactly(small: tuple[LossHessian, Tensor]) -> None:
    from fastssl.analysis.lanczos import lanczos

    _, matrix = small
    krylovs = [lanczos(lambda v: matrix @ v, start, 3) for start in torch.eye(len(matrix)).double()]
    powers = list(itertools.accumulate([matrix] * 4, torch.matmul))
    for power, moment in zip(powers, density_moments(krylovs), strict=True):
        assert len(matrix) * moment == pytest.approx(float(power.trace()), rel=1e-10)


@pytest.mark.parametrize("setting", [{"gha": True}, {"alpha": 1.5}], ids=str)
def test_a_gradient_of_no_function_is_refused(setting: dict) -> None:
    cfg = build_config({"loss": {"name": "minc"} | setting})
    with pytest.raises(ConfigError, match=f"loss.{next(iter(setting))}"):
        twice_differentiable(cfg)


def test_what_is_held_is_named_for_every_loss_that_holds_something() -> None:
    assert held_fixed(build_config({"loss": {"name": "mio"}}).loss) == "nothing"
    assert HELD.keys() <= LOSSES.keys()
    for name in LOSSES:
        has_target = hasattr(LOSSES[name][0](), "target_momentum")
        assert not has_target or "target" in HELD[name]
