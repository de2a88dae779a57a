"""Pair sums: the equation with loops, autograd, strips of any size, precision, memory, refusals."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.pair_loss import KINDS, MAX_EXP_INV_TEMPERATURE, chunked, pair_sums, pair_sums_grad, reference

IMPLS = ("chunked", "reference")


def unit(num_rows: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, width, generator=generator, dtype=dtype), dim=1)


def scalar_value(kind: str, s: float, t: float) -> float:
    x = t * s
    return {
        "exp": math.exp(x - t),
        "softplus": math.log1p(math.exp(x)),
        "quadratic": math.log(2) + x / 2 + x * x / 8,
    }[kind]


def set_strip_rows(monkeypatch: pytest.MonkeyPatch, num_rows: int, columns: Tensor) -> None:
    """Make the chunked form work `num_rows` rows at a time: two buffers of [num_rows, n]."""
    strip_bytes = 2 * num_rows * len(columns) * columns.element_size()
    monkeypatch.setitem(chunked.STRIP_BYTES, "cpu", strip_bytes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_the_equation_with_loops(kind: str, impl: str) -> None:
    columns, num_rows, offset, t = unit(12, 5), 4, 4, 3.0
    expected = []
    for i in range(num_rows):
        own, partner = offset + i, offset + (i + 2) % 4
        negatives = [k for k in range(12) if k not in (own, partner)]
        expected.append(sum(scalar_value(kind, float(columns[own] @ columns[k]), t) for k in negatives))
    actual = pair_sums(columns[4:8], columns, kind=kind, inv_temperature=t, row_offset=offset, impl=impl)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


@pytest.mark.parametrize("strip_rows", [1, 3, 5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_strips_of_any_size_equal_the_reference(kind: str, strip_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = unit(42, 7)
    set_strip_rows(monkeypatch, strip_rows, columns)
    g = torch.rand(42, dtype=torch.float64)
    own = slice(14, 28)
    settings = {"kind": kind, "inv_temperature": 4.0, "row_offset": 14}
    sums = [pair_sums(columns[own], columns, impl=impl, **settings) for impl in IMPLS]
    grads = [pair_sums_grad(columns[own], columns, g[own], g, impl=impl, **settings) for impl in IMPLS]
    torch.testing.assert_close(*sums, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_grad_is_autograd_of_every_pair_of_the_global_batch(kind: str, impl: str) -> None:
    """Three blocks of one global batch: the local formula gives each block's slice of the whole gradient."""
    u, g = unit(18, 5).requires_grad_(), torch.randn(18, dtype=torch.float64)
    blocks = [slice(start, start + 6) for start in (0, 6, 12)]
    total = sum(g[own] @ reference.pair_sums(u[own], u, kind, 2.5, own.start) for own in blocks)
    (expected,) = torch.autograd.grad(total, u)
    columns = u.detach()
    for own in blocks:
        actual = pair_sums_grad(
            columns[own], columns, g[own], g, kind=kind, inv_temperature=2.5, row_offset=own.start, impl=impl
        )
        torch.testing.assert_close(actual, expected[own], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_rows_and_gradients(kind: str) -> None:
    u = unit(5, 10).T
    assert not u.is_contiguous()
    g = torch.ones((), dtype=torch.float64).expand(10)
    for impl in IMPLS:
        settings = {"kind": kind, "inv_temperature": 2.0, "impl": impl}
        dense = u.contiguous()
        torch.testing.assert_close(pair_sums(u, u, **settings), pair_sums(dense, dense, **settings))
        torch.testing.assert_close(
            pair_sums_grad(u, u, g, g, **settings), pair_sums_grad(dense, dense, g.clone(), g.clone(), **settings)
        )


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_stays_near_fp64_and_half_inputs_accumulate_in_fp32(kind: str, clustered: bool) -> None:
    u = unit(256, 64)
    if clustered:  # eight tight groups, as trained projections are: many similarities near 1
        u = F.normalize(u[:8].repeat(32, 1) + 0.1 * u, dim=1)
    g, t = torch.rand(256, dtype=torch.float64), 20.0
    settings = {"kind": kind, "inv_temperature": t}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = u.to(dtype)
        exact = rounded.double()
        sums, grads = pair_sums(rounded, rounded, **settings), pair_sums_grad(rounded, rounded, g, g, **settings)
        assert sums.dtype == grads.dtype == torch.float32
        assert relative_error(sums, pair_sums(exact, exact, **settings)) < 3e-6
        assert relative_error(grads, pair_sums_grad(exact, exact, g, g, **settings)) < 3e-6


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_reach_the_products(kind: str, impl: str) -> None:
    u = unit(32, 16, dtype=torch.float32)
    settings = {"kind": kind, "inv_temperature": 2.0, "impl": impl}
    expected = pair_sums(u, u, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        actual = pair_sums(u, u, **settings)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_exp_at_the_lowest_temperature_neither_overflows_nor_vanishes(impl: str) -> None:
    u = F.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), dim=1)  # only s = -1 is left
    settings = {"kind": "exp", "inv_temperature": MAX_EXP_INV_TEMPERATURE, "impl": impl}
    sums = pair_sums(u, u, **settings)
    torch.testing.assert_close(torch.log(sums), torch.full((4,), math.log(2) - 80.0))
    collapsed = u[:1].expand(4, 2)
    torch.testing.assert_close(pair_sums(collapsed, collapsed, **settings), torch.full((4,), 2.0))


def test_softplus_is_exact_far_above_zero() -> None:
    u = unit(1, 4).expand(4, 4)
    for impl in IMPLS:
        actual = pair_sums(u, u, kind="softplus", inv_temperature=25.0, impl=impl)
        expected = torch.full((4,), 2 * (25 + math.log1p(math.exp(-25))), dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-15, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returned."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_never_holds_the_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    u, g = unit(512, 8), torch.ones(512, dtype=torch.float64)
    set_strip_rows(monkeypatch, 30, u)
    largest = {}
    for impl in IMPLS:
        settings = {"kind": kind, "inv_temperature": 2.0, "impl": impl}
        with LargestTensor() as mode:
            pair_sums(u, u, **settings)
            pair_sums_grad(u, u, g, g, **settings)
        largest[impl] = mode.num_elements
    assert largest == {"chunked": 30 * 512, "reference": 512 * 512}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.zeros(8, 3)}, r"\[m, D\] and \[n, D\]"),
        ({"columns": torch.zeros(8, 4, dtype=torch.float64)}, "one floating dtype"),
        ({"rows": torch.zeros(3, 4)}, "even number"),
        ({"row_offset": 5}, "row_offset 5"),
        ({"row_offset": -1}, "row_offset -1"),
        ({"kind": "cosine"}, "exp, softplus, quadratic"),
        ({"inv_temperature": 0.0}, "inv_temperature must be finite"),
        ({"inv_temperature": math.nan}, "inv_temperature must be finite"),
        ({"kind": "exp", "inv_temperature": 41.0}, "<= 40 for exp"),
        ({"impl": "fused"}, "impl must be one of auto"),
    ],
)
def test_refusals_name_what_is_wrong(change: dict, message: str) -> None:
    arguments = {"rows": torch.zeros(4, 4), "columns": torch.zeros(8, 4), "kind": "softplus", "inv_temperature": 2.0}
    arguments |= change
    rows, columns = arguments.pop("rows"), arguments.pop("columns")
    with pytest.raises(ValueError, match=message):
        pair_sums(rows, columns, **arguments)


def test_gradients_of_the_wrong_length_are_refused() -> None:
    u = unit(4, 3)
    with pytest.raises(ValueError, match="grad_rows and grad_columns"):
        pair_sums_grad(u, u, u[:, 0], u[:2, 0], kind="exp", inv_temperature=2.0)
