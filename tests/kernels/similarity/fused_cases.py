"""Cases of the fused kernels: test_fused.py runs them in Triton's interpreter, test_fused_gpu.py on a GPU."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.similarity import Side, Term, epilogues, fused, reference, strips, tiles
from kernels.similarity import rows as torch_rows
from tests.helpers import rounded, three_way
from tests.helpers.three_way import (
    Case,
    assert_three_way,
    make_inputs,
    run,
    worst_row_error,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

KINDS = ("exp", "softplus", "square")


def slow_but(quick: Iterable, every: Iterable, slow_on_gpu: Iterable = ()) -> list:
    """Parameters, slow but for the quick ones: the interpreter takes half a second for 17 samples.

    Those of `slow_on_gpu` are quick in the interpreter only: test_fused_gpu.py compiles the same paths for more rows.
    """
    quick, every, slow_on_gpu = list(quick), list(every), list(slow_on_gpu)
    assert all(x in every for x in quick)
    assert all(x in quick for x in slow_on_gpu)
    params = []
    for x in every:
        marks = [pytest.mark.slow_on_gpu] if x in slow_on_gpu else [] if x in quick else [pytest.mark.slow]
        params.append(pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=marks))
    return params


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 16 rows, so that a block has several."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 2 * 16 * 16)


EXPONENTS = [
    *(("exp", t, log2_exp_b) for t, log2_exp_b in [(2.0, 0), (5.0, -4), (20.0, -14), (40.0, 0)]),
    *(("softplus", t, log2_exp_b) for t, log2_exp_b in [(2.0, 0), (10.0, -14), (40.0, 7)]),
    *(("square", t, log2_exp_b) for t, log2_exp_b in [(2.0, 0), (40.0, -14)]),
]


@pytest.mark.parametrize(
    ("kind", "t", "log2_exp_b", "clustered"),
    slow_but(
        [*((*x, True) for x in EXPONENTS), ("exp", 20.0, -14, False), ("softplus", 2.0, 0, False)],
        [(*x, clustered) for x in EXPONENTS for clustered in (False, True)],
    ),
)
def test_three_way(kind: str, t: float, log2_exp_b: int, clustered: bool, device: str) -> None:
    assert_three_way(Case(device=device, kind=kind, t=t, log2_exp_b=log2_exp_b, clustered=clustered, symmetric=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", ["columns left out", "bf16 operands"])
def test_the_criterion_sees_a_mistake(mistake: str, kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's own computation, which meets the criterion otherwise. The columns are one tile of the interpreter."""

    def accumulate(rows: Side, columns: Side, term: Term, own: int | None) -> None:
        if mistake == "bf16 operands":
            columns.u = columns.u.bfloat16().half()  # of both sides, which are one
            rounded.accumulate(rows, columns, term, own)
            return
        counted = reference._is_counted(rows, columns, own)
        counted[:, 16:32] = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "_is_counted", lambda *_: counted)
            rounded.accumulate(rows, columns, term, own)

    case = Case(device=device, kind=kind, log2_exp_b=-1, num_samples=64, symmetric=True, clustered=True)
    module = SimpleNamespace(normalize=rounded.normalize, accumulate=rounded.accumulate)
    monkeypatch.setitem(three_way.FORMS, "fused", (module, torch.float32))
    assert_three_way(case)
    module.accumulate = accumulate
    for name in case.wanted:
        with pytest.raises(AssertionError, match=f"{name} of rows"):
            assert_three_way(replace(case, wanted=(name,)))


@pytest.mark.parametrize("log2_exp_b", [-20, -14, -6, 0])
def test_values_of_strips_have_all_their_digits(log2_exp_b: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """log(1 + e^l) of l down to -14, though the logarithm's error is absolute, which the interpreter's is not."""
    if device == "cpu":
        monkeypatch.setattr(epilogues, "lg2", lg2_with_the_largest_error)
    case = Case(kind="softplus", t=2.0, log2_exp_b=log2_exp_b, width=300, symmetric=True, wanted=("sums",))
    assert_three_way(replace(case, device=device))


@triton.jit
def lg2_with_the_largest_error(x, INTERP: tl.constexpr):
    return tl.math.log2(x) + 2.384185791015625e-07  # 2^-22


@pytest.mark.parametrize(
    ("kind", "num_samples"),
    slow_but([("exp", 1), ("softplus", 2), ("square", 3), ("exp", 33)], itertools.product(KINDS, [1, 2, 3, 33])),
)
def test_any_number_of_samples(kind: str, num_samples: int, device: str) -> None:
    assert_three_way(Case(device=device, kind=kind, num_samples=num_samples, log2_exp_b=-1, width=16, symmetric=True))


@pytest.mark.parametrize(
    ("kind", "width"),
    slow_but(
        [("exp", 5), ("softplus", 128), ("square", 200), *((kind, 300) for kind in KINDS), ("exp", 1030)],
        itertools.product(KINDS, [5, 128, 200, 300, 1030]),
        slow_on_gpu=[("softplus", 128), ("square", 200)],
    ),
)
@pytest.mark.usefixtures("small_strips")
def test_any_width(kind: str, width: int, device: str) -> None:
    assert_three_way(Case(device=device, kind=kind, width=width, log2_exp_b=-1, symmetric=True, clustered=True))


@pytest.mark.parametrize(
    ("kind", "own", "width"),
    slow_but(
        [("exp", None, 24), ("softplus", 1, 24), ("softplus", None, 300), ("square", 0, 300)],
        [(*x, w) for x in [("exp", None), ("softplus", 1), ("square", 0), ("softplus", None)] for w in (24, 300)],
        slow_on_gpu=[("softplus", 1, 24), ("square", 0, 300)],
    ),
)
@pytest.mark.usefixtures("small_strips")
def test_more_blocks_of_columns_than_views(kind: str, own: int | None, width: int, device: str) -> None:
    """Both sides have accumulators: the columns' are filled with the roles turned."""
    assert_three_way(Case(device=device, kind=kind, num_blocks=3, own=own, width=width, log2_exp_b=1))


@pytest.mark.parametrize(
    ("t", "weight", "width"),
    slow_but(
        [(40.0, weight, width) for weight in (1e-6, 1e20) for width in (24, 300)],
        itertools.product([5.0, 40.0], [1e-6, 1.0, 1e20], [24, 300]),
    ),
)
@pytest.mark.usefixtures("small_strips")
def test_weights_of_any_magnitude(weight: float, t: float, width: int, device: str) -> None:
    assert_three_way(Case(device=device, kind="exp", t=t, weight=weight, width=width, clustered=True, symmetric=True))


@pytest.mark.parametrize("kind", slow_but(["exp"], KINDS, slow_on_gpu=["exp"]))
def test_weights_of_two_sides(kind: str, device: str) -> None:
    assert_three_way(Case(device=device, kind=kind, weight=3.0, num_blocks=3, own=1, width=24))


@pytest.mark.parametrize(
    ("kind", "weight", "width"),
    slow_but(
        [("exp", None, 24), ("softplus", None, 300), ("exp", 1.0, 24)],
        [(*x, w) for x in [("exp", None), ("exp", 1.0), ("softplus", None), ("square", 1.0)] for w in (24, 300)],
        slow_on_gpu=[("exp", None, 24), ("softplus", None, 300)],
    ),
)
@pytest.mark.usefixtures("small_strips")
def test_groups(kind: str, weight: float | None, width: int, device: str) -> None:
    assert_three_way(Case(device=device, kind=kind, groups=True, weight=weight, num_blocks=3, own=1, width=width))


@pytest.mark.parametrize("width", [24, 300])
def test_a_narrow_range_needs_no_scale(width: int, device: str) -> None:
    assert_three_way(
        Case(device=device, kind="exp", t=6.0, wide_range=False, width=width, symmetric=True, clustered=True)
    )


@pytest.mark.parametrize("wanted", [("sums",), ("slopes",), ("pulls",)])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_asked_for(kind: str, wanted: tuple[str, ...], device: str) -> None:
    for width in (24, 300):
        assert_three_way(Case(device=device, kind=kind, wanted=wanted, width=width, num_samples=5, symmetric=True))


@pytest.mark.parametrize(
    ("kind", "num_samples"), slow_but([("softplus", 31), ("exp", 41)], itertools.product(["exp", "softplus"], [31, 41]))
)
def test_tiles_with_more_columns_than_rows(
    kind: str, num_samples: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 4 if device == "cuda" else 1  # the tensor cores take 64 rows
    config = tiles.TileConfig(16 * scale, 32 * scale, 4, 1, 1)
    monkeypatch.setattr(tiles, "INTERPRETED_CONFIG", config)
    monkeypatch.setattr(tiles, "choose_config", lambda *_, **__: config)
    assert_three_way(Case(device=device, kind=kind, num_samples=scale * num_samples, num_blocks=3, own=1, width=16))


@pytest.mark.parametrize(
    ("kind", "groups"),
    slow_but([("exp", False), ("softplus", True)], [("exp", False), ("softplus", True), ("square", False)]),
)
def test_shares_of_the_columns(kind: str, groups: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "choose_splits", lambda *_: 3)
    assert_three_way(Case(device=device, kind=kind, num_samples=17, num_blocks=3, own=1, width=16, groups=groups))


@pytest.mark.parametrize("apart", [False, True])
def test_shares_are_added_to_accumulators(apart: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to those whose blocks and rows lie apart; each share but the first has memory of its own."""
    case = Case(device=device, kind="softplus", num_samples=33, num_blocks=3, own=1, width=16)
    u = fused.normalize(make_inputs(case).column_z, torch.tensor(case.t, device=device)).u
    full = partial(torch.full, device=device)
    found = []
    for num_splits in (1, 3):
        monkeypatch.setattr(tiles, "choose_splits", lambda *_, n=num_splits: n)
        memory = full((2, 2, 33, 2, 16), 2.0), full((2, 2, 33), 3.0), full((2, 2, 33), 4.0)
        pulls, sums, slopes = (memory[0][:, 1, :, 0], *(x[:, 1] for x in memory[1:])) if apart else (
            full((2, 33, 16), 2.0), full((2, 33), 3.0), full((2, 33), 4.0)
        )  # fmt: skip
        fused.accumulate(Side(u=u[1:], sums=sums, slopes=slopes, pulls=pulls), Side(u=u), case.term(torch.float32), 1)
        found.append((pulls, sums, slopes))
        assert (memory[0][:, 0] == 2).all()
        assert (memory[0][..., 1, :] == 2).all()
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_shares_fill_the_device() -> None:
    assert tiles.choose_splits(1024, 1024, 396, 2**25) == 1  # two shares would take more memory than they may
    assert tiles.choose_splits(128, 128, 396, 2**22) == 3  # 384 programs in one round of 396
    assert tiles.choose_splits(8, 8, 396, 2**18) == 2  # at least four tiles each
    assert tiles.choose_splits(8, 1, 396, 0) == 1


@pytest.mark.parametrize(
    ("num_rows", "num_views", "most_mb"),
    [(16384, 2, 13), (32768, 2, 26), (65536, 2, 51), (16384, 1, 21), (32768, 1, 34), (65536, 1, 51)],
)
def test_what_shares_take_beside_rows_and_pulls(num_rows: int, num_views: int, most_mb: int) -> None:
    """u, pulls and the shares' parts at a width of 128 on 132 multiprocessors; one view at a time as `cross` has it."""
    u_bytes, pulls_bytes = num_rows * 128 * 2, num_rows * 128 * 4
    config = tiles.choose_config(128, weighted=False, groups=False, only_pulls=False)
    num_programs = num_rows * num_views // 2 // config.rows
    taken = pulls_bytes * num_views // 2
    num_splits = tiles.choose_splits(num_programs, num_rows // config.columns, 132 * config.programs, taken)
    assert u_bytes + pulls_bytes + (num_splits - 1) * taken <= most_mb * 1e6


@pytest.mark.parametrize("width", [24, 300])
def test_blocks_that_lie_apart(width: int, device: str) -> None:
    """Columns with other memory between their blocks, as gathered views have."""
    case = Case(device=device, kind="softplus", num_samples=5, num_blocks=4, own=None, width=width)
    inputs = make_inputs(case)
    term = case.term(torch.float32)
    u = fused.normalize(inputs.column_z, term.inv_temperature).u
    apart = torch.full((4, 3, *u.shape[1:]), float("nan"), dtype=u.dtype, device=device)
    apart[:, 1] = u
    sums, pulls = torch.zeros(2, 2, 5, device=device), torch.zeros(2, 2, 2, 5, width, device=device)
    rows = [Side(u=u[:2], sums=sums[i], pulls=pulls[i, :, 1]) for i in range(2)]  # accumulators apart as well
    fused.accumulate(rows[0], Side(u=u), term, None)
    fused.accumulate(rows[1], Side(u=apart[:, 1]), term, None)
    assert torch.equal(rows[0].sums, rows[1].sums)
    assert torch.equal(rows[0].pulls, rows[1].pulls)


@pytest.mark.parametrize("wanted", [("sums",), ("slopes",), ("pulls",)])
def test_strips_make_what_a_side_asks_for(
    wanted: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No slopes in memory without pulls, no sums along the rows where the columns have no accumulators."""
    made = []
    run_strip, scratch = strips._run, strips._Scratch
    monkeypatch.setattr(strips, "_run", lambda *args: made.append(run_strip(*args)) or made[-1])
    monkeypatch.setattr(strips, "_Scratch", lambda *args: made.append("scratch") or scratch(*args))
    case = Case(device=device, kind="exp", width=300, num_blocks=3, own=1, wanted=wanted)
    inputs = make_inputs(case)
    rows, columns = run("fused", case, inputs)
    alone = Side(u=rows.u, **{name: torch.zeros_like(getattr(rows, name)) for name in wanted})
    made.clear()
    fused.accumulate(alone, Side(u=columns.u), case.term(torch.float32), case.own)
    assert torch.equal(getattr(alone, wanted[0]), getattr(rows, wanted[0]))
    assert ("scratch" in made) == (wanted == ("pulls",))
    for sums, slope_sums in (x for x in made if x != "scratch"):
        assert [x is not None for x in sums] == [wanted == ("sums",), False]
        assert [x is not None for x in slope_sums] == [wanted == ("slopes",), False]


@pytest.mark.parametrize("width", [24, 300])
def test_accumulators_are_added_to(width: int, device: str) -> None:
    case = Case(device=device, kind="softplus", num_samples=5, width=width, symmetric=True)
    inputs = make_inputs(case)
    (once, _), u = run("fused", case, inputs), fused.normalize(inputs.column_z, torch.tensor(case.t, device=device)).u
    twice = Side(u=u, sums=once.sums.clone(), slopes=once.slopes.clone(), pulls=once.pulls.clone())
    fused.accumulate(twice, twice, case.term(torch.float32), case.own)
    for name in case.wanted:
        torch.testing.assert_close(getattr(twice, name), 2 * getattr(once, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "width"), slow_but([("exp", 24), ("softplus", 300)], itertools.product(KINDS, [24, 300]))
)
@pytest.mark.usefixtures("small_strips")
def test_the_same_bits_every_time(kind: str, width: int, device: str) -> None:
    case = Case(device=device, kind=kind, width=width, num_blocks=2, own=0, weight=1.0 if kind == "exp" else None)
    inputs = make_inputs(case)
    first, second = run("fused", case, inputs), run("fused", case, inputs)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in case.wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros(kind: str, device: str) -> None:
    """They have the similarity 0 with everything, and no NaN."""
    case = Case(device=device, kind=kind, log2_exp_b=-1, symmetric=True)
    inputs = make_inputs(case)
    inputs.column_z[0, 3] = 0
    inputs.row_z[0, 3] = 0
    side, _ = run("fused", case, inputs)
    term = case.term(torch.float64)
    u = torch_rows.normalize(inputs.column_z.double(), term.inv_temperature).u
    exact = Side(u=u, sums=torch.zeros(2, 17, dtype=torch.float64, device=device))
    reference.accumulate(exact, exact, term, case.own)
    assert worst_row_error(side.sums, exact.sums) < 1e-3
    t, scale = torch.tensor([5.0, 0.1], device=device)
    rows = fused.normalize(inputs.column_z, t)
    dz, dots = fused.finish(inputs.column_z, rows.inv_norm, side.pulls, scale, -rows.positives)
    assert all(x.isfinite().all() for x in (*rows, dz, dots, side.pulls))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_views", "num_samples", "width"), [(1, 3, 5), (2, 17, 48), (3, 65, 130), (4, 2, 2048)])
def test_normalize(num_views: int, num_samples: int, width: int, dtype: torch.dtype, device: str) -> None:
    z = torch.randn(num_views, num_samples, width, device=device).to(dtype)
    t = torch.tensor(7.0, device=device)
    rows, exact = fused.normalize(z, t), torch_rows.normalize(z.double(), t.double())
    padded = -(-width // 8) * 8
    assert rows.u.shape == (num_views, num_samples, padded)
    assert rows.u.dtype == torch.float16
    assert rows.u.is_contiguous()
    assert not rows.u[..., width:].any()
    scale = (7.0 * torch.tensor(2.0, dtype=torch.float64).log().reciprocal()).sqrt()
    torch.testing.assert_close(rows.u[..., :width].double(), exact.u * scale, rtol=2**-11 + 1e-6, atol=2**-24)
    torch.testing.assert_close(rows.inv_norm.double(), exact.inv_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.positives.double(), exact.positives, rtol=0, atol=1e-6)
    assert rows.positives.shape == exact.positives.shape


def strided(z: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    if how == "views inside":
        return z.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "rows apart":
        return torch.cat([z, z], 2)[..., : z.shape[2]]
    return z.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("how", ["views inside", "rows apart", "width strided"])
def test_strides_of_z_do_not_matter(how: str, device: str) -> None:
    z, t = torch.randn(2, 9, 20, device=device), torch.tensor(3.0, device=device)
    other = strided(z, how)
    assert not other.is_contiguous()
    assert torch.equal(other, z)
    rows, others = fused.normalize(z, t), fused.normalize(other, t)
    assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))
    pulls, scale = torch.randn(2, 9, 20, device=device), torch.tensor(0.3, device=device)
    expected = fused.finish(z, rows.inv_norm, pulls, scale, rows.positives)
    actual = fused.finish(other, rows.inv_norm, strided(pulls, how), scale, rows.positives)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("num_views", "num_samples", "width"), [(1, 3, 5), (2, 17, 48), (4, 9, 130), (2, 2, 2048)])
def test_finish(num_views: int, num_samples: int, width: int, device: str) -> None:
    z = torch.randn(num_views, num_samples, width, device=device)
    rows = torch_rows.normalize(z, torch.tensor(1.0, device=device))
    pulls = torch.randn_like(z)
    grads = torch.randn_like(rows.positives)
    dz, dots = fused.finish(z, rows.inv_norm, pulls, torch.tensor(0.7, device=device), grads)
    wide = [x.double() for x in (z, rows.inv_norm, pulls, torch.tensor(0.7, device=device), grads)]
    expected, expected_dots = torch_rows.finish(*wide)
    torch.testing.assert_close(dz.double(), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max() + 1e-9))
    torch.testing.assert_close(dots.double(), expected_dots, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_finish_gives_the_dtype_of_z(dtype: torch.dtype, device: str) -> None:
    z = torch.randn(2, 5, 12, device=device).to(dtype)
    rows = fused.normalize(z, torch.tensor(1.0, device=device))
    pulls, grads = torch.randn(2, 5, 12, device=device), torch.randn(1, 5, device=device)
    arguments = (rows.inv_norm, pulls, torch.tensor(0.7, device=device), grads)
    dz, _ = fused.finish(z, *arguments)
    expected, _ = torch_rows.finish(z, *arguments)
    assert dz.dtype == dtype
    torch.testing.assert_close(dz, expected)


def test_refusals(device: str) -> None:
    case = Case(device=device, kind="exp")
    u = torch.zeros(2, 4, 8, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="blocks of both sides must be alike"):
        fused.accumulate(Side(u=u), Side(u=u[:, :3]), case.term(torch.float32), None)
    side = Side(u=u, sums=torch.zeros(4, 2, device=device).T)
    with pytest.raises(ValueError, match="dense rows"):
        fused.accumulate(side, side, case.term(torch.float32), 0)
