"""The tiled pass over pairs: the whole-matrix form and loops, every kind of side, tiles of any size, precision."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.similarity import Kind, Side, Term, chunked, load_impl, reference
from tests.helpers.pairs import clustered_rows, random_rows

KINDS = ("exp", "softplus", "square")
ACCUMULATORS = ("sums", "slopes", "pulls")


def unit(num_blocks: int, num_samples: int, width: int, *, seed: int = 0) -> Tensor:
    return F.normalize(random_rows(num_blocks, num_samples, width, seed=seed), dim=2)


def term(kind: Kind, t: float = 3.0, b: float = 0.4, dtype: torch.dtype = torch.float64) -> Term:
    return Term(kind=kind, inv_temperature=torch.tensor(t, dtype=dtype), bias=torch.tensor(b, dtype=dtype))


def side(u: Tensor, *, seed: int = 0, groups: bool = False, weights: bool = False, adds: tuple[str, ...] = ()) -> Side:
    """A side with what goes with its rows drawn at random, and accumulators that hold something already."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.rand(u.shape[:2], generator=generator, dtype=torch.float64) for name in ("g", "start")}
    start = drawn["start"].to(u.dtype)
    shapes = {"sums": start, "slopes": start, "pulls": start[..., None].expand(u.shape)}
    return Side(
        u=u,
        groups=torch.randint(0, 4, u.shape[:2], generator=generator) if groups else None,
        weights=drawn["g"].to(u.dtype) if weights else None,
        **{name: shapes[name].clone() for name in adds},
    )


def copy(side: Side) -> Side:
    return replace(side, **{name: x.clone() for name, x in vars(side).items() if x is not None and name != "u"})


def assert_same_results(kind: Kind, rows: Side, columns: Side, own: int | None) -> None:
    """Both implementations add the same to every accumulator, to 1e-12."""
    found = []
    for implementation in (chunked, reference):
        r = copy(rows)
        c = r if columns is rows else copy(columns)
        implementation.accumulate(r, c, term(kind), own)
        found.append([getattr(s, name) for s in (r, c) for name in ACCUMULATORS])
    assert any(x is not None for x in found[0])
    for ours, expected in zip(*found, strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[3, 1024])
def tile_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles that leave one row of the 7 over, and a tile of more rows than there are."""
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("groups", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_against_themselves(kind: Kind, weights: bool, groups: bool) -> None:
    rows = side(unit(3, 7, 5), groups=groups, weights=weights, adds=ACCUMULATORS)
    assert_same_results(kind, rows, rows, own=0)
    assert_same_results(kind, rows, rows, own=None)


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("own", [None, 0, 1, 2], ids=str)
@pytest.mark.parametrize("fills_columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("groups", [False, True], ids=["", "groups"])
@pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_against_other_columns(
    kind: Kind, weights: bool, groups: bool, fills_columns: bool, own: int | None
) -> None:
    """Two blocks of rows against four: with `own`, two of these are of the same samples."""
    rows = side(unit(2, 7, 5), groups=groups, weights=weights, adds=ACCUMULATORS)
    adds = ACCUMULATORS if fills_columns else ()
    columns = side(unit(4, 7, 5, seed=1), seed=1, groups=groups, weights=weights, adds=adds)
    assert_same_results(kind, rows, columns, own)


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_each_accumulator_alone(name: str, kind: Kind) -> None:
    rows, columns = side(unit(2, 7, 5), adds=(name,)), side(unit(1, 7, 5, seed=1), seed=1)
    assert_same_results(kind, rows, rows, own=0)
    assert_same_results(kind, rows, columns, own=None)
    assert_same_results(kind, columns, rows, own=None)  # only the columns ask


@pytest.mark.usefixtures("tile_rows")
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_lie_apart_in_memory(kind: Kind) -> None:
    """One view of several ranks' rows: every second block, accumulators likewise."""
    every = side(unit(6, 7, 5, seed=2), seed=2, groups=True, weights=True, adds=ACCUMULATORS)
    part = Side(**{name: x.view(3, 2, *x.shape[1:])[:, 1] for name, x in vars(every).items()})
    assert not part.u.is_contiguous()
    rows = side(unit(1, 7, 5), groups=True, weights=True, adds=ACCUMULATORS)
    assert_same_results(kind, rows, part, own=None)
    assert_same_results(kind, part, part, own=0)
    before = every.sums.clone()  # pyright: ignore[reportOptionalMemberAccess]
    chunked.accumulate(rows, part, term(kind), None)  # into the memory of the whole
    changed = (every.sums != before).any(1)
    assert changed.tolist() == [False, True] * 3


def value_and_slope(kind: Kind, logit: float) -> tuple[float, float]:
    return {
        "exp": (math.exp(logit), math.exp(logit)),
        "softplus": (math.log(1 + math.exp(logit)), 1 / (1 + math.exp(-logit))),
        "square": (logit**2, 2 * logit),
    }[kind]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_equation_with_loops(kind: Kind, impl: str) -> None:
    """Rows of two views against three blocks, of which 1 and 2 are of the same samples."""
    rows = side(unit(2, 3, 4), groups=True, weights=True)
    columns = side(unit(3, 3, 4, seed=1), seed=1, groups=True, weights=True)
    assert rows.groups is not None
    assert columns.groups is not None
    assert rows.weights is not None
    assert columns.weights is not None
    expected = {name: torch.zeros(2, 3, 4, dtype=torch.float64) for name in ACCUMULATORS}
    num_counted = 0
    for v, i, q, k in torch.cartesian_prod(*map(torch.arange, (2, 3, 3, 3))).tolist():
        if (q in (1, 2) and i == k) or rows.groups[v, i] == columns.groups[q, k]:
            continue
        num_counted += 1
        value, slope = value_and_slope(kind, 3.0 * float(rows.u[v, i] @ columns.u[q, k]) + 0.4)
        slope *= float(rows.weights[v, i] + columns.weights[q, k])
        expected["sums"][v, i] += value
        expected["slopes"][v, i] += slope
        expected["pulls"][v, i] += slope * columns.u[q, k]
    assert 0 < num_counted < 42
    rows.sums, rows.slopes = torch.zeros(2, 2, 3, dtype=torch.float64)
    rows.pulls = torch.zeros(2, 3, 4, dtype=torch.float64)
    load_impl(impl).accumulate(rows, columns, term(kind), 1)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(rows.sums, expected["sums"][..., 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rows.slopes, expected["slopes"][..., 0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rows.pulls, expected["pulls"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_softplus_is_exact_far_from_zero(impl: str) -> None:
    u = unit(1, 1, 4).expand(1, 4, 4).contiguous()
    for logit in (60.0, 25.0, -25.0, -60.0):
        rows = Side(u=u, sums=torch.zeros(1, 4, dtype=torch.float64), slopes=torch.zeros(1, 4, dtype=torch.float64))
        far = term("softplus", t=2.0, b=logit - 2.0)
        load_impl(impl).accumulate(rows, rows, far, 0)  # pyright: ignore[reportArgumentType]
        expected = 3 * (max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))
        torch.testing.assert_close(rows.sums, torch.full((1, 4), expected, dtype=torch.float64), rtol=1e-14, atol=0)
        expected = 3 / (1 + math.exp(-logit))
        torch.testing.assert_close(rows.slopes, torch.full((1, 4), expected, dtype=torch.float64), rtol=1e-14, atol=0)


def eager(u: Tensor, kind: Kind, t: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, slopes and pulls of the rows [1, n, D] against each other as anyone would write them in torch."""
    logits = u[0] @ u[0].T * t + b
    value, slope = {
        "exp": lambda x: (x.exp(), x.exp()),
        "softplus": lambda x: (F.softplus(x), x.sigmoid()),
        "square": lambda x: (x.square(), 2 * x),
    }[kind](logits)
    counted = ~torch.eye(len(logits), dtype=torch.bool)
    value, slope = value * counted, slope * counted
    return value.sum(1)[None], slope.sum(1)[None], (slope @ u[0])[None]


@pytest.mark.parametrize("rows", [random_rows, clustered_rows], ids=["random", "clustered"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_as_near_to_fp64_as_torch_is(kind: Kind, rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", 60)
    u = F.normalize(rows(1, 256, 64), dim=2).float()
    t, b = 20.0, -3.0
    n = Side(u=u, sums=torch.zeros(1, 256), slopes=torch.zeros(1, 256), pulls=torch.zeros(u.shape))
    chunked.accumulate(n, n, term(kind, t, b, torch.float32), 0)
    exact = eager(u.double(), kind, t, b)
    for ours, theirs, wanted in zip((n.sums, n.slopes, n.pulls), eager(u, kind, t, b), exact, strict=True):
        assert ours is not None
        error, their_error = ((x.double() - wanted).norm() / wanted.norm() for x in (ours, theirs))
        assert error <= their_error + 1e-7
        assert error < 1e-5


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_autocast_does_not_reach_the_products(impl) -> None:
    u = unit(2, 9, 16).float()
    found = []
    for enabled in (False, True):
        rows = Side(u=u, sums=torch.zeros(2, 9), pulls=torch.zeros(2, 9, 16))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            load_impl(impl).accumulate(rows, rows, term("exp", dtype=torch.float32), 0)
        found.append((rows.sums, rows.pulls))
    for plain, autocast in zip(*found, strict=True):
        assert torch.equal(plain, autocast)


BUFFERS = [("exp", ("sums", "slopes", "pulls"), 1), ("square", ("pulls",), 1), ("square", ("sums", "pulls"), 2)]
BUFFERS += [("softplus", ("sums",), 2), ("softplus", ("pulls",), 2), ("softplus", ("sums", "pulls"), 3)]


@pytest.mark.parametrize(("kind", "adds", "num_buffers"), BUFFERS)
def test_a_kind_takes_the_buffers_it_fills(
    kind: Kind, adds: tuple[str, ...], num_buffers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.TILE_ROWS, "cpu", 16)
    taken = []

    class Buffers(chunked._Buffers):
        def take(self, name: str, shape) -> Tensor:
            taken.append(super().take(name, shape).untyped_storage())
            return super().take(name, shape)

    monkeypatch.setattr(chunked, "_Buffers", Buffers)
    rows = side(unit(2, 40, 5), adds=adds)
    chunked.accumulate(rows, rows, term(kind), 0)
    storages = {storage.data_ptr(): storage.nbytes() for storage in taken}
    assert list(storages.values()) == [16 * 16 * 8] * num_buffers
