"""Losses with a logarithm for each row: the equation on the whole matrix, torch's cross-entropy, range, refusals."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.partition_loss import partition_loss, partition_terms
from kernels.similarity import chunked
from tests.helpers.pairs import (
    ROWS,
    assert_same_with_grads,
    is_negative,
    is_positive,
    log_sums,
    random_rows,
    similarities,
)

IMPLS = ("chunked", "reference")
FORMS = ("nt_xent", "dcl", "dclw")
VIEWS = {"self2": (2, "self"), "self3": (3, "self"), "cross": (2, "cross")}
GROUPS = torch.tensor([4, 7, 4, 0, 7, 4, 2])
T = torch.tensor(2.5, dtype=torch.float64)
CASES = [(form, views) for form in FORMS for views in VIEWS if (form, views) != ("dclw", "self3")]


@pytest.fixture(autouse=True)
def tiles_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", 3)


def whole_matrix(z: Tensor, t: Tensor, *, form: str, topology: str, groups: Tensor | None) -> Tensor:
    """The mean over the ordered positive pairs (i, p)."""
    s, positive = similarities(z), is_positive(z)
    lse = log_sums(t * s, is_negative(z, topology, groups))[:, None].expand_as(s)[positive]
    s_p = s[positive]
    if form == "nt_xent":
        return torch.log1p(torch.exp(lse - t * s_p)).mean()
    # 2 - N softmax over the N samples of one view; the two views are the two halves of s_p.
    w = 1 if form == "dcl" else 2 - len(s_p) / 2 * torch.softmax(s_p.detach().view(2, -1) / 0.5, 1).flatten()
    return (lse - w * t * s_p).mean()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["", "groups"])
@pytest.mark.parametrize(("form", "views"), CASES)
def test_it_is_the_equation(form, views: str, groups: Tensor | None, impl) -> None:
    num_views, topology = VIEWS[views]
    settings = {"form": form, "topology": topology, "groups": groups}
    assert_same_with_grads(
        lambda z, t: partition_loss(z, inv_temperature=t, impl=impl, **settings),
        lambda z, t: whole_matrix(z, t, **settings),
        random_rows(num_views, 7, 5),
        T,
    )


@pytest.mark.parametrize("t", [2.0, 20.0])
def test_nt_xent_is_the_cross_entropy_over_all_other_rows(t: float) -> None:
    """The equation above has the same shape as the code under test; this one has not."""

    def cross_entropy(z: Tensor, t: Tensor) -> Tensor:
        logits = (t * similarities(z)).masked_fill(torch.eye(14, dtype=torch.bool), -math.inf)
        return F.cross_entropy(logits, (torch.arange(14) + 7) % 14)

    assert_same_with_grads(
        lambda z, t: partition_loss(z, inv_temperature=t),
        cross_entropy,
        random_rows(2, 7, 5),
        torch.tensor(t, dtype=torch.float64),
    )


def test_nt_xent_of_cross_topology_is_clip() -> None:
    def clip(z: Tensor, t: Tensor) -> Tensor:
        u = F.normalize(z, dim=2)
        logits, labels = t * u[0] @ u[1].T, torch.arange(7)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    assert_same_with_grads(
        lambda z, t: partition_loss(z, inv_temperature=t, topology="cross"), clip, random_rows(2, 7, 5), T
    )


def test_dclw_is_dcl_where_positives_are_equal_and_above_it_elsewhere() -> None:
    """Weights have mean 1 and fall with s_p: then mean w s_p <= mean s_p."""
    same = random_rows(1, 6, 4).expand(2, 6, 4)
    dclw, dcl = (partition_loss(same, form=form, inv_temperature=2.0).item() for form in ("dclw", "dcl"))
    assert dclw == pytest.approx(dcl, rel=1e-13)
    z = random_rows(2, 6, 4)
    assert partition_loss(z, form="dclw", inv_temperature=2.0) > partition_loss(z, form="dcl", inv_temperature=2.0)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("form", ["nt_xent", "dcl"])  # dclw holds its weights fixed: no gradient of its value
def test_gradcheck(form, views: str) -> None:
    num_views, topology = VIEWS[views]
    groups = torch.tensor([0, 1, 0, 2])
    settings = {"form": form, "topology": topology, "groups": groups, "impl": "chunked"}
    inputs = [x.clone().requires_grad_() for x in (random_rows(num_views, 4, 3), T)]
    assert torch.autograd.gradcheck(lambda z, t: partition_loss(z, inv_temperature=t, **settings), inputs)


@pytest.mark.parametrize("views", VIEWS)
def test_gradcheck_with_a_gradient_for_each_row(views: str) -> None:
    """What a loss may ask for: rows with unequal weights, and one of the two outputs without the other."""
    num_views, topology = VIEWS[views]
    inputs = [x.clone().requires_grad_() for x in (random_rows(num_views, 4, 3), T)]
    for output in (0, 1):
        assert torch.autograd.gradcheck(
            lambda z, t, output=output: partition_terms(z, inv_temperature=t, topology=topology)[output], inputs
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_log_sums_are_logsumexp(impl) -> None:
    z = random_rows(3, 7, 5)
    terms = partition_terms(z, inv_temperature=T, groups=GROUPS, impl=impl)
    s, counted = similarities(z), is_negative(z, "self", GROUPS)
    expected = torch.logsumexp((T * s).masked_fill(~counted, -math.inf), 1).view(3, 7)
    torch.testing.assert_close(terms.log_sums, expected, rtol=1e-13, atol=1e-13)
    blocks = s.view(3, 7, 3, 7).diagonal(dim1=1, dim2=3)  # [view, view, sample]
    expected = torch.stack([blocks[0, 1], blocks[0, 2], blocks[1, 2]])
    torch.testing.assert_close(terms.positives, expected, rtol=1e-13, atol=1e-13)


def test_rows_without_negatives_leave_nt_xent_at_zero_and_finite() -> None:
    z = random_rows(2, 4, 3).float().requires_grad_()
    groups = torch.zeros(4, dtype=torch.int64)
    for form in FORMS:
        value = partition_loss(z, form=form, inv_temperature=2.0, groups=groups)
        (grad,) = torch.autograd.grad(value, z)
        assert value.isfinite()
        assert grad.isfinite().all()
        if form == "nt_xent":
            assert abs(value.item()) < 1e-30


@pytest.mark.parametrize("form", ["dcl", "dclw"])
def test_rows_without_negatives_add_their_positive_alone(form) -> None:
    """All samples of one group: what is left is -w t s_p, in fp32 as in fp64."""
    z = random_rows(2, 4, 3)
    groups = torch.zeros(4, dtype=torch.int64)
    s_p = F.cosine_similarity(z[0], z[1])
    w = 1 if form == "dcl" else 2 - 4 * torch.softmax(s_p / 0.5, 0)
    for rows in (z, z.float()):
        value = partition_loss(rows, form=form, inv_temperature=2.0, groups=groups)
        assert value.item() == pytest.approx(float((-w * 2.0 * s_p).mean()), rel=1e-6)


# -- the range of the exponentials: temperature .01, learned, in fp32


@pytest.mark.parametrize("views", ["self2", "cross"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_a_learned_temperature_of_one_hundredth_is_finite_and_near_fp64(form, rows: str, views: str) -> None:
    z = ROWS[rows](2, 32, 8)

    def value_and_grads(z: Tensor) -> tuple[Tensor, ...]:
        leaves = [z.clone().requires_grad_(), torch.tensor(100.0, dtype=z.dtype, requires_grad=True)]
        value = partition_loss(leaves[0], form=form, inv_temperature=leaves[1], topology=VIEWS[views][1])
        return (value.detach(), *torch.autograd.grad(value, leaves))

    for actual, expected in zip(value_and_grads(z.float()), value_and_grads(z), strict=True):
        assert actual.isfinite().all()
        # |t s| <= 100 in fp32 is off by up to 1e-5, e^{t s} by that fraction of itself.
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-4)


def simplex_rows(num_samples: int) -> Tensor:
    """Two equal views; every negative has s = -1 / (B - 1)."""
    rows = torch.eye(num_samples, dtype=torch.float64) - 1 / num_samples
    return rows.expand(2, num_samples, num_samples).clone()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_samples", "t"), [(6, 100.0), (8, 110.0), (3, 80.0), (2, 60.0)])
def test_a_row_is_right_while_t_times_its_distance_is_below_127(num_samples: int, t: float, form) -> None:
    """t (1 - s) = 120 or more, for every negative: at t = 100 and s = -.2 as at 60 and -1."""
    z = simplex_rows(num_samples)
    assert 119.9 < t * (1 + 1 / (num_samples - 1)) < 127

    def value_and_grads(z: Tensor) -> tuple[Tensor, ...]:
        leaves = [z.clone().requires_grad_(), torch.tensor(t, dtype=z.dtype, requires_grad=True)]
        terms = partition_terms(leaves[0], inv_temperature=leaves[1])
        value = partition_loss(leaves[0], form=form, inv_temperature=leaves[1])
        return (terms.log_sums.detach(), value.detach(), *torch.autograd.grad(value, leaves))

    for actual, expected in zip(value_and_grads(z.float()), value_and_grads(z), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-4)


def test_beyond_that_a_row_vanishes_and_nothing_overflows() -> None:
    """Two opposite samples at t = 100."""
    leaves = [simplex_rows(2).float().requires_grad_(), torch.tensor(100.0, requires_grad=True)]
    terms = partition_terms(leaves[0], inv_temperature=leaves[1])
    assert terms.is_empty.all()
    for form in FORMS:
        value = partition_loss(leaves[0], form=form, inv_temperature=leaves[1])
        assert all(x.isfinite().all() for x in (value, *torch.autograd.grad(value, leaves)))


# -- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "info_nce"}, "form must be one of nt_xent, dcl, dclw, got 'info_nce'"),
        ({"form": "dclw", "z": torch.zeros(3, 4, 3)}, "form dclw is for two views, got 3"),
        ({"z": torch.zeros(4, 3)}, r"z must be \[views, samples, width\]"),
        ({"z": torch.zeros(1, 4, 3)}, "topology self needs at least two views, got 1"),
        ({"z": torch.zeros(3, 4, 3), "topology": "cross"}, "topology cross needs two views, got 3"),
        ({"topology": "ring"}, "topology must be one of self, cross"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, r"groups must be integers \[4\]"),
        ({"inv_temperature": torch.ones(3)}, r"inv_temperature must have one element, got \[3\]"),
        ({"z": torch.zeros(2, 1, 4)}, "z must have at least two samples over all ranks, got 1 on 1 rank"),
        ({"inv_temperature": -2.0}, "inv_temperature must be finite and > 0"),
        ({"inv_temperature": 100.0}, "inv_temperature must be <= 60 for exp, got 100"),
        ({"impl": "cuda"}, "impl must be one of auto"),
    ],
)
def test_refusals_name_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"z": torch.zeros(2, 4, 3), "inv_temperature": 2.0} | change
    with pytest.raises(ValueError, match=message):
        partition_loss(arguments.pop("z"), **arguments)
