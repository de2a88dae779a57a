"""Positive mean + negative mean: the equation on the whole matrix, every choice; known cases; range; refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.exchange import ALONE
from kernels.pair_loss import count_negatives, pair_loss, pair_terms
from kernels.similarity import chunked
from tests.helpers.pairs import ROWS, assert_same_with_grads, is_negative, is_positive, random_rows, similarities

IMPLS = ("chunked", "reference")
NEGATIVES = ("exp", "jensen", "softplus", "square")
POSITIVES = ("linear", "softplus")
VIEWS = {"self2": (2, "self"), "self3": (3, "self"), "cross": (2, "cross")}
GROUPS = torch.tensor([4, 7, 4, 0, 7, 4, 2])
T, T_P, B = (torch.tensor(x, dtype=torch.float64) for x in (2.5, 1.7, -0.6))


@pytest.fixture(autouse=True)
def tiles_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", 3)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def whole_matrix(
    z: Tensor,
    t: Tensor,
    t_p: Tensor,
    b: Tensor,
    *,
    negatives: str,
    positives: str,
    balanced: bool,
    topology: str,
    groups: Tensor | None,
) -> Tensor:
    """The equation. `cross` over the rows of both views: each pair is counted from both sides, the means are equal."""
    s = similarities(z)
    s_p, s_n = s[is_positive(z)], s[is_negative(z, topology, groups)]
    positive = (softplus(-(t_p * s_p + b)) if positives == "softplus" else -t_p * s_p).mean()
    logits = t * s_n + b
    negative = {
        "exp": lambda: logits.exp().mean(),
        "jensen": lambda: torch.log1p(logits.exp().mean()),
        "softplus": lambda: softplus(logits).mean(),
        "square": lambda: logits.square().mean(),
    }[negatives]()
    return positive + negative * (1 if balanced else len(s_n) / len(s))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["", "groups"])
@pytest.mark.parametrize("balanced", [True, False], ids=["", "unbalanced"])
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_it_is_the_equation(negatives, positives, balanced: bool, groups: Tensor | None, views: str, impl) -> None:
    num_views, topology = VIEWS[views]
    settings = {"negatives": negatives, "positives": positives, "balanced": balanced}
    settings |= {"topology": topology, "groups": groups}

    def ours(z: Tensor, t: Tensor, t_p: Tensor, b: Tensor) -> Tensor:
        return pair_loss(z, inv_temperature=t, positive_inv_temperature=t_p, bias=b, impl=impl, **settings)

    def expected(z: Tensor, t: Tensor, t_p: Tensor, b: Tensor) -> Tensor:
        return whole_matrix(z, t, t_p, b, **settings)

    assert_same_with_grads(ours, expected, random_rows(num_views, 7, 5), T, T_P, B)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_numbers_and_learned_tensors_give_the_same(negatives) -> None:
    """Numbers take short cuts: no shift where e^l is known to be narrow. One positive temperature where none is set."""
    z = random_rows(2, 7, 5)
    for t, b in itertools.product((2.5, 20.0), (0.0, -0.6)):
        as_tensors = {"inv_temperature": torch.tensor(t), "bias": torch.tensor(b)}  # fp32: as a model's parameters are
        by_number = pair_loss(z, negatives=negatives, inv_temperature=t, bias=float(torch.tensor(b)))
        torch.testing.assert_close(pair_loss(z, negatives=negatives, **as_tensors), by_number, rtol=1e-12, atol=0)
        both = pair_loss(z, negatives=negatives, positive_inv_temperature=t, **as_tensors)
        torch.testing.assert_close(both, by_number, rtol=1e-12, atol=0)


@pytest.mark.parametrize("topology", ["self", "cross"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["", "groups"])
def test_it_is_the_equation_with_loops(groups: Tensor | None, topology) -> None:
    """SigLIP's and MIO's form, pair by pair: also a check of the whole-matrix equation above."""
    z = random_rows(2, 7, 5)
    u = [[row / row.norm() for row in view] for view in z]
    positive, negative, num_negatives = 0.0, 0.0, 0
    for (v, i), (w, k) in itertools.product(itertools.product(range(2), range(7)), repeat=2):
        if topology == "cross" and v == w:
            continue
        logit = 2.5 * float(u[v][i] @ u[w][k]) - 0.6
        if i == k:
            positive += math.log(1 + math.exp(-logit)) / 14 if v != w else 0.0
        elif groups is None or groups[i] != groups[k]:
            negative += math.log(1 + math.exp(logit))
            num_negatives += 1
    for balanced, divisor in ((True, num_negatives), (False, 14)):
        actual = pair_loss(
            z,
            negatives="softplus",
            positives="softplus",
            inv_temperature=2.5,
            bias=-0.6,
            balanced=balanced,
            topology=topology,
            groups=groups,
        )
        assert actual.item() == pytest.approx(positive + negative / divisor, rel=1e-13)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradcheck(negatives, views: str) -> None:
    num_views, topology = VIEWS[views]

    def loss(z: Tensor, t: Tensor, t_p: Tensor, b: Tensor) -> Tensor:
        return pair_loss(
            z,
            negatives=negatives,
            positives="softplus",
            inv_temperature=t,
            positive_inv_temperature=t_p,
            bias=b,
            topology=topology,
            groups=torch.tensor([0, 1, 0, 2]),
            impl="chunked",
        )

    inputs = [x.clone().requires_grad_() for x in (random_rows(num_views, 4, 3), T, T_P, B)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_each_output_of_the_operator_alone_has_its_gradient() -> None:
    """The other's upstream gradient is missing then, not zero."""
    z = random_rows(2, 5, 3).requires_grad_()
    for output in (0, 1):
        assert torch.autograd.gradcheck(
            lambda z, output=output: pair_terms(z, kind="exp", inv_temperature=T, bias=B)[output], z
        )


def test_all_samples_of_one_group_leave_the_positives_alone() -> None:
    z = random_rows(2, 5, 3).requires_grad_()
    for negatives in NEGATIVES:
        groups = torch.zeros(5, dtype=torch.int64)
        value = pair_loss(z, negatives=negatives, inv_temperature=2.0, groups=groups)
        positive = -2.0 * F.cosine_similarity(z[0], z[1]).mean()
        assert value.item() == pytest.approx(positive.item(), rel=1e-13)
        ours, expected = (torch.autograd.grad(x, z)[0] for x in (value, positive))
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_groups_may_be_strided_and_of_any_integers(dtype: torch.dtype) -> None:
    z = random_rows(2, 7, 5)
    groups = (GROUPS.repeat_interleave(2)[::2] * -3).to(dtype)
    strided = torch.stack([groups, groups], 1)[:, 0]
    assert not strided.is_contiguous()
    expected = pair_loss(z, negatives="exp", inv_temperature=2.5, groups=GROUPS)
    assert torch.equal(pair_loss(z, negatives="exp", inv_temperature=2.5, groups=strided), expected)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["", "groups"])
def test_count_of_negatives(groups: Tensor | None, views: str) -> None:
    num_views, topology = VIEWS[views]
    z = random_rows(num_views, 7, 5)
    expected = int(is_negative(z, topology, groups).sum()) // (2 if topology == "cross" else 1)
    assert float(count_negatives(z, topology, groups, ALONE)) == expected


# -- the range of the exponentials: temperature .01, learned, in fp32


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("negatives", ["exp", "jensen", "softplus"])
def test_a_learned_temperature_of_one_hundredth_stays_finite_where_the_loss_is(negatives, rows: str) -> None:
    """The loss of `exp` itself reaches e^100 where negatives are equal, which fp32 does not have: then it is inf."""
    z = ROWS[rows](2, 32, 8)

    def value_and_grads(z: Tensor) -> tuple[Tensor, ...]:
        leaves = [z.clone().requires_grad_(), torch.tensor(100.0, dtype=z.dtype, requires_grad=True)]
        value = pair_loss(leaves[0], negatives=negatives, inv_temperature=leaves[1])
        return (value.detach(), *torch.autograd.grad(value, leaves))

    exact, ours = value_and_grads(z), value_and_grads(z.float())
    if negatives == "exp" and exact[0] > torch.finfo(torch.float32).max:
        assert rows in ("clustered", "collapsed", "opposite")
        assert ours[0] == math.inf
        return
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.isfinite().all()
        # |t s| <= 100 in fp32 is off by up to 1e-5, e^{t s} by that fraction of itself.
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-4)


@pytest.mark.parametrize("rows", ROWS)
def test_the_exponential_is_finite_at_every_temperature_that_a_config_allows(rows: str) -> None:
    z = ROWS[rows](2, 32, 8).float().requires_grad_()
    for t in (60.0, torch.tensor(60.0, requires_grad=True), torch.tensor(80.0, requires_grad=True)):
        value = pair_loss(z, negatives="exp", inv_temperature=t)
        leaves = [z, t] if isinstance(t, Tensor) else [z]
        assert all(x.isfinite().all() for x in (value, *torch.autograd.grad(value, leaves)))


@pytest.mark.parametrize("topology", ["self", "cross"])
@pytest.mark.parametrize("b", [-300.0, 50.0, 1000.0])
def test_jensen_takes_any_bias(b: float, topology) -> None:
    """e^{t s + b} leaves fp32, its logarithm does not."""

    def value_and_grads(z: Tensor, impl) -> tuple[Tensor, ...]:
        leaves = [z.clone().requires_grad_(), *(torch.tensor(x, dtype=z.dtype, requires_grad=True) for x in (5.0, b))]
        settings = {"negatives": "jensen", "topology": topology, "impl": impl}
        value = pair_loss(leaves[0], inv_temperature=leaves[1], bias=leaves[2], **settings)
        by_number = pair_loss(leaves[0], inv_temperature=5.0, bias=b, **settings)
        assert torch.equal(value, by_number)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    z = random_rows(2, 16, 8)
    exact = value_and_grads(z, "reference")
    s = similarities(z)
    mean = torch.logsumexp(5 * s[is_negative(z, topology)], 0) - math.log(int(is_negative(z, topology).sum()))
    torch.testing.assert_close(exact[0], -5 * s[is_positive(z)].mean() - F.logsigmoid(-mean - b))
    for actual, expected in zip(value_and_grads(z.float(), "chunked"), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-6)


def test_exp_of_a_large_bias_is_right_as_long_as_the_loss_is_a_number_of_fp32() -> None:
    z = random_rows(2, 16, 8)
    for b in (-60.0, 60.0, 80.0):
        exact = pair_loss(z, negatives="exp", inv_temperature=5.0, bias=b, impl="reference")
        ours = pair_loss(z.float(), negatives="exp", inv_temperature=5.0, bias=b)
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-6)


# -- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(4, 3)}, r"z must be \[views, samples, width\] of a floating dtype, got \[4, 3\]"),
        ({"z": torch.zeros(2, 0, 3)}, r"got \[2, 0, 3\]"),
        ({"z": torch.zeros(2, 4, 3, dtype=torch.int64)}, "of torch.int64"),
        ({"z": torch.zeros(1, 4, 3)}, "topology self needs at least two views, got 1"),
        ({"z": torch.zeros(3, 4, 3), "topology": "cross"}, "topology cross needs two views, got 3"),
        ({"topology": "ring"}, "topology must be one of self, cross, got 'ring'"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, r"groups must be integers \[4\], got \[3\]"),
        ({"groups": torch.zeros(4)}, r"groups must be integers \[4\], got \[4\] of torch.float32"),
        ({"negatives": "cosine"}, "negatives must be one of exp, jensen, softplus, square, got 'cosine'"),
        ({"positives": "exp"}, "positives must be one of linear, softplus, got 'exp'"),
        ({"inv_temperature": 0.0}, "inv_temperature must be finite and > 0"),
        ({"inv_temperature": math.nan}, "inv_temperature must be finite and > 0"),
        ({"positive_inv_temperature": -1.0}, "^positive_inv_temperature must be finite and > 0, got -1"),
        ({"bias": math.inf}, "bias must be finite, got inf"),
        ({"bias": math.nan}, "bias must be finite, got nan"),
        ({"inv_temperature": torch.ones(2)}, r"^inv_temperature must have one element, got \[2\]"),
        ({"positive_inv_temperature": torch.ones(2)}, r"^positive_inv_temperature must have one element, got \[2\]"),
        ({"bias": torch.ones(0)}, r"bias must have one element, got \[0\]"),
        ({"groups": torch.zeros(4, dtype=torch.bool)}, r"groups must be integers \[4\], got \[4\] of torch.bool"),
        (
            {"groups": torch.zeros(4, dtype=torch.int64, device="meta")},
            "groups must be on the device of z, cpu, got meta",
        ),
        ({"z": torch.zeros(2, 1, 4)}, "z must have at least two samples over all ranks, got 1 on 1 rank"),
        ({"inv_temperature": 100.0}, "inv_temperature must be <= 60 for exp, got 100"),
        ({"negatives": "jensen", "inv_temperature": 61.0}, "inv_temperature must be <= 60 for exp"),
        ({"impl": "cuda"}, "impl must be one of auto"),
    ],
)
def test_refusals_name_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"z": torch.zeros(2, 4, 3), "negatives": "exp", "inv_temperature": 2.0} | change
    with pytest.raises(ValueError, match=message):
        pair_loss(arguments.pop("z"), **arguments)


def test_softplus_takes_any_inverse_temperature() -> None:
    z = random_rows(2, 4, 3)
    assert pair_loss(z, negatives="softplus", inv_temperature=100.0).isfinite()
