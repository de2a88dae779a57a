"""How the objectives hang together: identities between losses that are written apart."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.losses import MincConfig, MioConfig, SigLipConfig, TiCoConfig, build_loss

NUM, WIDTH = 9, 5


def draw(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, NUM, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def grad(value: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(value, z)[0]


def test_minc_divided_by_its_scale_is_tico_with_rho_of_half_the_scale() -> None:
    z, targets, scale = draw(), list(draw(1).detach()), 6.0
    u = F.normalize(draw(2).detach().flatten(0, 1), dim=1)
    minc = build_loss(MincConfig(scale=scale), WIDTH).double().eval()
    tico = build_loss(TiCoConfig(covariance_weight=scale / 2), WIDTH).double().eval()
    minc.moment.average.copy_(u.T @ u / len(u))
    tico.moment.average.copy_(minc.moment.average)
    minc.moment.weight.fill_(1.0)
    tico.moment.momentum = 1.0  # C is what it was, as Lambda is
    ours, theirs = minc(*z, targets=targets), tico(*z, targets=targets)
    torch.testing.assert_close(ours / scale, theirs - 1)
    torch.testing.assert_close(grad(ours / scale, z), grad(theirs, z))


def similarities(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All s_ik [2N, 2N], and which pairs are positives and negatives."""
    u = F.normalize(z, dim=2).flatten(0, 1)
    sample = torch.arange(2 * NUM) % NUM
    is_negative = sample[:, None] != sample
    return u @ u.T, ~is_negative & ~torch.eye(2 * NUM, dtype=torch.bool), is_negative


@pytest.mark.parametrize("scale", [0.2, 0.01])
def test_mio_exp_at_a_high_temperature_is_minc_and_a_first_moment_that_minc_lacks(scale: float) -> None:
    """At the scale s0 = 1/tau |e^x - 1 - x - x^2/2| <= |x|^3 e^|x| / 6 is all that is left, x = s0 s."""
    z = draw()
    s, _, is_negative = similarities(z.detach())
    mio = build_loss(MioConfig(negative="exp", temperature_positive=1 / scale, temperature_negative=1 / scale))
    minc = build_loss(MincConfig(scale=scale), WIDTH).double()
    # MINC's mean is over all rows, a row itself and its partner too; MIO's over negatives.
    other_rows = s[is_negative].square().mean() - s.square().mean()
    known = minc(*z, targets=list(z)) + 1 + scale * s[is_negative].mean() + scale**2 / 2 * other_rows
    x = scale * s[is_negative]
    assert 0 < abs((mio(*z) - known).item()) <= (x.abs() ** 3 * x.abs().exp() / 6).mean()


def test_quadratic_mio_has_a_form_without_pairs_of_exactly_half_its_gradient() -> None:
    """First and second moments of the other rows, held fixed: a row then never meets a negative."""
    z, tau_p, tau_n = draw(), 0.4, 0.7
    mio = build_loss(MioConfig(negative="quadratic", temperature_positive=tau_p, temperature_negative=tau_n))
    u = F.normalize(z, dim=2).flatten(0, 1)
    fixed = u.detach()
    _, is_positive, is_negative = similarities(z.detach())
    count = 2 * NUM - 2
    first = is_negative.double() @ fixed / count  # [2N, D]
    second = torch.einsum("ik,kd,ke->ide", is_negative.double(), fixed, fixed) / count  # [2N, D, D]
    linear = (u * first).sum(1) / (2 * tau_n)
    square = torch.einsum("id,ide,ie->i", u, second, u) / (8 * tau_n**2)
    value = math.log(2) + (linear + square - (u * (is_positive.double() @ fixed)).sum(1) / tau_p).mean()
    torch.testing.assert_close(value, mio(*z))
    torch.testing.assert_close(grad(value, z), grad(mio(*z), z) / 2)


def test_naive_mio_is_siglip_balanced_without_bias_and_with_negatives_of_the_same_view() -> None:
    z, tau = draw(), 0.3
    siglip = build_loss(SigLipConfig(initial_inv_temperature=1 / tau, initial_bias=0.0)).double()
    siglip.log_inv_temperature.data.fill_(math.log(1 / tau))  # made in fp32
    u = F.normalize(z, dim=2)

    def negatives(a: int, b: int) -> Tensor:
        """Sum of softplus(s/tau) over i != j of views a and b: SigLIP without its positives."""
        return NUM * (siglip(z[a], z[b]) - F.softplus(-(u[a] * u[b]).sum(1) / tau).mean())

    total = negatives(0, 0) + negatives(1, 1) + 2 * negatives(0, 1)
    positive = F.softplus(-(u[0] * u[1]).sum(1) / tau).mean()
    value = positive + total / (2 * NUM * (2 * NUM - 2))
    naive = build_loss(MioConfig(negative="naive", temperature_positive=tau, temperature_negative=tau))(*z)
    torch.testing.assert_close(value, naive)
    torch.testing.assert_close(grad(value, z), grad(naive, z))
