"""Losses from D x D moments: the sum over explicit pairs, known cases, refusals."""

import math

import pytest
import torch
from torch import Tensor

import kernels.gram_loss.terms
from kernels.gram_loss import gram_terms, quadratic_loss, spectral_loss
from kernels.pair_loss import pair_terms
from tests.helpers.pairs import assert_same_with_grads, is_negative, is_positive, random_rows, similarities

IMPLS = ("chunked", "reference")
VIEWS = {"self2": (2, "self"), "self3": (3, "self"), "cross": (2, "cross")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("mu", [0.5, 3.0, 1e4])
def test_spectral_is_its_sum_over_pairs(mu: float, views: str, impl) -> None:
    """mu: nearly all rows are shortened, some are, none is."""
    num_views, topology = VIEWS[views]
    z = random_rows(num_views, 7, 5)
    num_shortened = int((z.norm(dim=2) > math.sqrt(mu)).sum())
    assert {0.5: num_shortened > 6 * num_views, 3.0: 0 < num_shortened < 6 * num_views, 1e4: num_shortened == 0}[mu]

    def pairs(z: Tensor) -> Tensor:
        rows = z.flatten(0, 1)
        norm = rows.norm(dim=1, keepdim=True)
        x = torch.where(norm > math.sqrt(mu), rows / norm * math.sqrt(mu), rows)
        s = x @ x.T
        return (-2 * s[is_positive(z)].mean() + s[is_negative(z, topology)].square().mean()) / mu

    assert_same_with_grads(lambda z: spectral_loss(z, mu=mu, topology=topology, impl=impl), pairs, z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("positive", [None, 3.5])
def test_quadratic_is_its_sum_over_pairs(positive: float | None, views: str, impl) -> None:
    num_views, topology = VIEWS[views]

    def pairs(z: Tensor) -> Tensor:
        s = similarities(z)
        x = 2.5 * s[is_negative(z, topology)]
        return (math.log(2) + x / 2 + x**2 / 8).mean() - (positive or 2.5) * s[is_positive(z)].mean()

    def ours(z: Tensor) -> Tensor:
        return quadratic_loss(z, inv_temperature=2.5, positive_inv_temperature=positive, topology=topology, impl=impl)

    assert_same_with_grads(ours, pairs, random_rows(num_views, 7, 5))


@pytest.mark.parametrize("views", VIEWS)
def test_the_moments_give_what_the_pass_over_pairs_gives(views: str) -> None:
    """(s + b)^2 = s^2 + 2 b s + b^2."""
    num_views, topology = VIEWS[views]
    one, b = torch.ones((), dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    num_pairs = 7 * 6 * (num_views**2 if topology == "self" else 1)

    def passed(z: Tensor) -> Tensor:
        terms = pair_terms(z, kind="square", inv_temperature=one, bias=b, topology=topology)
        return terms.total - num_pairs * b**2 + terms.positives.sum()

    def moments(z: Tensor) -> Tensor:
        terms = gram_terms(z, linear=0.6, square=1.0, topology=topology)
        return terms.total + terms.positives.sum()

    assert_same_with_grads(moments, passed, random_rows(num_views, 7, 5))


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl, views: str, unit: bool) -> None:
    num_views, topology = VIEWS[views]
    z = random_rows(num_views, 4, 3).requires_grad_()
    settings = {"linear": 0.7, "square": 0.4, "unit": unit, "topology": topology, "impl": impl}
    for output in (0, 1):
        assert torch.autograd.gradcheck(lambda z, output=output: gram_terms(z, **settings)[output], z)


def test_gradcheck_through_the_shortening() -> None:
    z = random_rows(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectral_loss(z, mu=2.0), z)


def test_known_values_of_spectral() -> None:
    rows = torch.eye(8, dtype=torch.float64)[:4].expand(2, 4, 8)
    assert spectral_loss(rows).item() == pytest.approx(-2)  # partners equal, others orthogonal
    assert spectral_loss(rows[:, :1].expand(2, 4, 8)).item() == pytest.approx(-1)  # collapse: -2 + 1
    assert spectral_loss(10 * rows, mu=4.0).item() == pytest.approx(-2)  # shortened to 2: -2 * 4 / 4


def test_rows_of_no_length_are_finite() -> None:
    z = random_rows(2, 4, 3)
    z[0, 1] = 0
    z.requires_grad_()
    (grad,) = torch.autograd.grad(spectral_loss(z), z)
    assert grad.isfinite().all()
    # The gradient of an inner product at 0 is the other row, less what its pairs, all 0, do not pull.
    longest = z[1, 1].norm().clamp_min(1)
    torch.testing.assert_close(grad[0, 1], -2 / 4 * z[1, 1].detach() / longest.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_auto_sees_the_dtype_of_z_and_not_of_the_shortened_rows(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module in (kernels.gram_loss, kernels.gram_loss.terms):
        choose = module.choose_impl
        monkeypatch.setattr(module, "choose_impl", lambda impl, z, c=choose: seen.append((impl, z.dtype)) or c(impl, z))
    spectral_loss(random_rows(2, 4, 3).to(dtype))
    assert [z_dtype for impl, z_dtype in seen if impl == "auto"] == [dtype]


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (spectral_loss, {"mu": 0.0}, "mu must be finite and > 0, got 0"),
        (spectral_loss, {"mu": math.inf}, "mu must be finite and > 0, got inf"),
        (spectral_loss, {"z": torch.zeros(3, 4, 3)}, "topology cross needs two views, got 3"),
        (spectral_loss, {"z": torch.zeros(4, 3)}, r"z must be \[views, samples, width\]"),
        (spectral_loss, {"impl": "cuda"}, "impl must be one of auto"),
        (quadratic_loss, {"inv_temperature": 0.0}, "inv_temperature must be finite and > 0"),
        (quadratic_loss, {"positive_inv_temperature": -1.0}, "^positive_inv_temperature must be finite and > 0"),
        (quadratic_loss, {"inv_temperature": torch.tensor(2.0)}, "^inv_temperature must be a number"),
        (quadratic_loss, {"positive_inv_temperature": torch.tensor(2.0)}, "^positive_inv_temperature must be a number"),
        (
            spectral_loss,
            {"z": torch.zeros(2, 1, 4)},
            "z must have at least two samples over all ranks, got 1 on 1 rank",
        ),
        (quadratic_loss, {"topology": "ring"}, "topology must be one of self, cross"),
    ],
)
def test_refusals_name_what_is_wrong(function, change: dict, message: str) -> None:
    arguments = {"z": torch.zeros(2, 4, 3)} | ({"inv_temperature": 2.0} if function is quadratic_loss else {}) | change
    with pytest.raises(ValueError, match=message):
        function(arguments.pop("z"), **arguments)
