"""Norms and variances of gradients: against autograd by hand, and where the answer is known."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.analysis.gradnorm import NUM_FIRST_BATCHES, GradientSize, measure_gradients, table_rows
from fastssl.losses import LOSSES, Loss, MincConfig, MioConfig, NtXentConfig, SpectralConfig, build_loss
from fastssl.losses.base import ModuleLoss
from tests.helpers.pairs import random_rows


class Projector(nn.Module):
    """Views [B, D] -> projections [B, D']."""

    def __init__(self, width: int, projector_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, projector_dim, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(random_rows(1, projector_dim, width, seed=1)[0])

    def forward(self, views: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return views, [self.linear(view) for view in views]


class MeanOfFirst(nn.Module):
    """The mean of the first view's projections, whose gradient for a linear map is the mean of the images."""

    def forward(self, *z: Tensor) -> Tensor:
        return z[0].mean()


def batches_of(num_samples: int, width: int, *, mean: float = 0.0, noise: float = 0.5) -> Iterator[list[Tensor]]:
    """Endless batches of two views: a random vector around `mean`, and for each view some noise."""
    generator = torch.Generator().manual_seed(0)
    while True:
        x = mean + torch.randn(num_samples, width, generator=generator, dtype=torch.float64)
        yield [x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def measure(loss: dict[str, Loss], num_samples: int, width: int, num_batches: int, **drawn) -> dict[str, GradientSize]:
    network = Projector(width, 1 if "mean" in loss else 3)
    batches = batches_of(num_samples, width, **drawn)
    return measure_gradients(network, [*network.parameters()], loss, batches, num_batches=num_batches)


def test_the_variance_of_a_mean_is_that_of_an_image_over_their_number() -> None:
    """A batch's gradient is the mean of B vectors with expectation 2 and variance 1 + .5^2 in each of D entries."""
    found = measure({"mean": ModuleLoss(MeanOfFirst())}, 8, 5, 1000, mean=2.0)["mean"]
    variance, squared_norm = 5 * 1.25 / 8, 5 * 2.0**2
    assert found.variance == pytest.approx(variance, rel=0.06)
    assert found.squared_norm == pytest.approx(squared_norm, rel=0.01)
    assert found.relative_variance == pytest.approx(variance / squared_norm, rel=0.06)
    assert found.projections_norm == pytest.approx(1 / math.sqrt(8))


def test_two_batches_by_hand() -> None:
    network = Projector(2, 1)
    images = [torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])]
    ignored = [torch.full((2, 1, 2), 100.0)] * NUM_FIRST_BATCHES
    batches = iter([list(views.double()) for views in [*ignored, *images]])
    losses = {"mean": ModuleLoss(MeanOfFirst())}
    found = measure_gradients(network, [*network.parameters()], losses, batches, num_batches=2)["mean"]
    assert found.mean.tolist() == [2.0, 2.0]
    assert found.variance == pytest.approx(1 + 1 + 4 + 4)
    assert found.squared_norm == pytest.approx(8 - 10 / 2)


def test_one_batch_has_no_variance() -> None:
    network = Projector(2, 1)
    with pytest.raises(ValueError, match="two batches or more, got 1"):
        measure_gradients(network, [*network.parameters()], {"mean": ModuleLoss(MeanOfFirst())}, batches_of(4, 2),
                          num_batches=1)  # fmt: skip


def naive(z: Tensor) -> Tensor:
    u, n = F.normalize(z.flatten(0, 1), dim=1), z.shape[1]
    s = u @ u.T
    others = ~torch.eye(n, dtype=torch.bool).repeat(2, 2)
    return F.softplus(-s.diagonal(n) / 0.5).mean() + F.softplus(s[others] / 0.5).mean()


def simclr(z: Tensor) -> Tensor:
    u, n = F.normalize(z.flatten(0, 1), dim=1), z.shape[1]
    s = (u @ u.T / 0.5).fill_diagonal_(-math.inf)
    return F.cross_entropy(s, torch.arange(2 * n).roll(n))


def minc(z: Tensor) -> Tensor:
    """One batch over and over: its own moment is the running average."""
    u, moment = math.sqrt(10) * F.normalize(z, dim=2), torch.zeros(3, 3, dtype=z.dtype)
    for row in u.flatten(0, 1).detach():
        moment += torch.outer(row, row) / (2 * z.shape[1])
    a, b = u
    pulled = -((a * b.detach()).sum(1) + (b * a.detach()).sum(1)).mean() / 2
    return pulled + ((u @ moment) * u).sum(2).mean() / 2


@pytest.mark.parametrize(
    ("config", "by_hand"),
    [(MioConfig(negative="naive"), naive), (NtXentConfig(), simclr), (MincConfig(norm="unit"), minc)],
    ids=["naive", "simclr", "minc"],
)
def test_norms_are_those_of_the_equations(config, by_hand) -> None:
    views = list(random_rows(2, 6, 4))
    network = Projector(4, 3)
    again = iter([views] * (NUM_FIRST_BATCHES + 2))
    losses = {"it": build_loss(config, 3).double().train()}
    found = measure_gradients(network, [*network.parameters()], losses, again, num_batches=2)["it"]
    z = torch.stack(network(views)[1]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(by_hand(z), z)
    (whole,) = torch.autograd.grad(by_hand(torch.stack(network(views)[1])), network.linear.weight)
    assert found.projections_norm == pytest.approx(float(slope.norm()), rel=1e-6)
    torch.testing.assert_close(found.mean, whole.flatten(), rtol=1e-5, atol=1e-7)
    assert found.variance == pytest.approx(0, abs=1e-6)


def test_minc_is_the_spectral_loss_times_a_quarter_of_mu_with_less_variance() -> None:
    """At equal functions (`clip`, s = mu) expected gradients are parallel; Lambda averages over more images."""
    losses = {"minc": build_loss(MincConfig(norm="clip", scale=10.0), 3), "spectral": build_loss(SpectralConfig(mu=10))}
    found = measure({name: loss.double().train() for name, loss in losses.items()}, 4, 3, 300)
    minc, spectral = found["minc"], found["spectral"]
    assert math.sqrt(minc.squared_norm / spectral.squared_norm) == pytest.approx(10 / 4, rel=0.1)
    assert float(F.cosine_similarity(minc.mean, spectral.mean, dim=0)) > 0.99
    assert spectral.relative_variance > 1.3 * minc.relative_variance


def test_every_loss_has_a_row_relative_to_the_reference() -> None:
    losses = {"": NtXentConfig(), **{name: config() for name, (config, _) in LOSSES.items()}}
    built = {name: build_loss(config, 3).double().train() for name, config in losses.items()}
    rows = table_rows(measure(built, 8, 4, 3))
    assert [row["loss"] for row in rows] == [*LOSSES]
    assert {row["loss"]: row["relative_to_simclr"] for row in rows}["simclr"] == 1
    assert rows[0]["cosine_to_first"] == 1
    assert all(row["variance"] > 0 and row["projections_norm"] > 0 for row in rows)
