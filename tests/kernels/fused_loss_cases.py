"""Cases of the losses with fused kernels: test_fused_losses.py runs them in Triton's interpreter, on a GPU
test_fused_losses_gpu.py does."""

from dataclasses import replace

import pytest
import torch

from kernels.similarity import Side, fused, strips
from tests.helpers.loss_three_way import LN_2, LossCase, assert_loss_three_way, exact_shift, run_loss
from tests.helpers.three_way import TOLERANCE

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

NEGATIVES = ("softplus", "exp", "jensen", "square")
WARM, COLD = exact_shift(54), exact_shift(28)  # 2.57 and 20.6: e^{t s} within fp16, and beyond it
COLDEST = exact_shift(-87)  # 100.3: temperature .01
LEARNED = {"inv_temperature": COLD, "bias": -14 * LN_2}  # SigLIP begins at 10 and -10
VIEWS = {"self2": ("self", 2), "self3": ("self", 3), "cross": ("cross", 2)}


def pair_case(negatives: str, positives: str, t: float = WARM, views: str = "self2", **changes) -> LossCase:
    topology, num_views = VIEWS[views]
    settings = {"negatives": negatives, "positives": positives, "inv_temperature": t, "topology": topology}
    return LossCase(loss="pair", settings=settings, num_views=num_views, **changes)


def learning_pair_case(
    negatives: str, views: str = "cross", learned: dict[str, float] = LEARNED, **changes
) -> LossCase:
    """t and b learned, negatives of a row summed: with `softplus` it is SigLIP."""
    topology, num_views = VIEWS[views]
    settings = {"negatives": negatives, "positives": "softplus", "balanced": False, "topology": topology}
    return LossCase(loss="pair", settings=settings, learned=learned, num_views=num_views, **changes)


def partition_case(form: str, views: str = "self2", t: float = COLD, **changes) -> LossCase:
    topology, num_views = VIEWS[views]
    learned = {"inv_temperature": t}
    settings = {"form": form, "topology": topology}
    return LossCase(loss="partition", settings=settings, learned=learned, num_views=num_views, **changes)


def gram_case(form: str, views: str, **changes) -> LossCase:
    topology, num_views = VIEWS[views]
    settings = {"spectral": {"mu": 3.0}, "quadratic": {"inv_temperature": 5.0}}[form] | {"topology": topology}
    return LossCase(loss=form, settings=settings, num_views=num_views, **changes)  # pyright: ignore[reportArgumentType]


SIGLIP = learning_pair_case("softplus")
NT_XENT = partition_case("nt_xent")
QUICK = [
    *(pair_case(negatives, "softplus") for negatives in NEGATIVES),
    *(pair_case(negatives, "linear", COLD, rows="random") for negatives in NEGATIVES),
    *(learning_pair_case(negatives) for negatives in NEGATIVES),
    pair_case("softplus", "softplus", COLD, "self2", groups=True),
    pair_case("jensen", "softplus", COLD, "cross", groups=True, rows="random"),
    pair_case("softplus", "softplus", COLD, "cross", width=300),
    learning_pair_case("exp", width=300),
    partition_case("nt_xent"),
    partition_case("dcl", "cross", rows="random"),
    partition_case("dclw", "cross"),
    partition_case("nt_xent", "cross", t=COLDEST),
    partition_case("dcl", "self3", num_samples=5, width=5),
    partition_case("nt_xent", "cross", width=300, rows="random"),
    gram_case("spectral", "cross", width=5, num_samples=33, rows="random"),
    gram_case("quadratic", "self2", width=300),
]  # fmt: skip
# Quick in the interpreter only: test_fused_losses_gpu.py compiles the same paths for more rows.
QUICK_INTERPRETED = [
    pair_case("exp", "linear", COLD, "self3", width=5),
    *(learning_pair_case(negatives, learned=LEARNED | {"inv_temperature": COLDEST}, width=5)
      for negatives in ("softplus", "jensen")),
    partition_case("nt_xent", "cross", width=200, groups=True),
    *(gram_case(form, views) for form in ("spectral", "quadratic") for views in VIEWS),
]  # fmt: skip
SLOW = [
    *(
        pair_case(negatives, positives, t, views, rows=rows)
        for negatives in NEGATIVES
        for positives in ("softplus", "linear")
        for t, rows in ((WARM, "random"), (COLD, "clustered"))
        for views in VIEWS
    ),
    *(
        replace(case, width=width, num_samples=num_samples, rows=rows)
        for case in [
            *(learning_pair_case(negatives, views) for negatives in NEGATIVES for views in ("self2", "cross")),
            *(partition_case(form, views) for form in ("nt_xent", "dcl", "dclw") for views in ("self2", "cross")),
            *(gram_case(form, views) for form in ("spectral", "quadratic") for views in VIEWS),
        ]
        for width, num_samples in ((24, 33), (200, 17), (300, 17))
        for rows in ("random", "clustered")
    ),
    # Warm where rows are so narrow: else few pairs make up the sums of exponentials, and which way the slope of one of
    # them is rounded where it lies half way decides whose error is larger.
    *(
        replace(case, width=5, num_samples=33, rows=rows)
        for case in [
            *(learning_pair_case(x, learned=LEARNED | {"inv_temperature": WARM}) for x in NEGATIVES),
            *(partition_case(form, t=WARM) for form in ("nt_xent", "dcl", "dclw")),
            *(gram_case(form, views) for form in ("spectral", "quadratic") for views in VIEWS),
        ]
        for rows in ("random", "clustered")
    ),
    *(
        partition_case(form, views, COLDEST, rows=rows)
        for form in ("nt_xent", "dcl", "dclw")
        for views in ("self2", "cross")
        for rows in ("random", "clustered")
    ),
]
SMALL = [SIGLIP, partition_case("nt_xent", num_samples=5), gram_case("spectral", "cross"), pair_case("exp", "linear")]


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 16 rows, so that a block has several."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 2 * 16 * 16)


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(x, marks=pytest.mark.slow_on_gpu) for x in QUICK_INTERPRETED)], ids=str
)
@pytest.mark.usefixtures("small_strips")
def test_three_way(case: LossCase, device: str) -> None:
    assert_loss_three_way(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
@pytest.mark.usefixtures("small_strips")
def test_more_three_way(case: LossCase, device: str) -> None:
    assert_loss_three_way(case, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_narrow_rows_give_what_the_same_numbers_in_fp32_give(case: LossCase, dtype: torch.dtype, device: str) -> None:
    """But for the dtype of dz. (The interpreter cuts fp32 to bf16 where a GPU rounds: hence a whole last place.)"""
    z = replace(case, rows="random", num_samples=5, dtype=dtype).make_z(device)
    ours, wide = run_loss(case, "fused", device, z), run_loss(case, "fused", device, z.float())
    assert ours["z"].dtype == dtype
    last_place = torch.finfo(dtype).eps
    for name, x in ours.items():
        rtol = last_place if name == "z" else TOLERANCE
        atol = TOLERANCE * float(wide[name].abs().max())
        torch.testing.assert_close(x.to(wide[name].dtype), wide[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_same_bits_again_and_under_autocast(case: LossCase, device: str) -> None:
    first = run_loss(case, "fused", device)
    with torch.autocast(device, torch.bfloat16):
        second = run_loss(case, "fused", device)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # numpy's
def test_nan_and_infinite_rows_reach_the_loss(case: LossCase, device: str) -> None:
    for bad in (float("nan"), float("inf")):
        z = replace(case, num_samples=5).make_z(device)
        z[0, 3, 2] = bad
        results = run_loss(case, "fused", device, z)
        assert all(x.isnan().any() for x in results.values())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_a_gradient_the_value_is_the_same(case: LossCase, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the product of slopes and rows is left out."""
    expected = run_loss(case, "fused", device)["value"]
    accumulate, seen = fused.accumulate, []

    def spy(rows: Side, columns: Side, *arguments) -> None:
        seen.append((rows.pulls, columns.pulls, rows.slopes, columns.slopes))
        accumulate(rows, columns, *arguments)

    monkeypatch.setattr(fused, "accumulate", spy)
    learned = {name: torch.tensor(x, device=device, requires_grad=True) for name, x in case.learned.items()}
    with torch.no_grad():
        value = case.compute(case.make_z(device).requires_grad_(), learned, "fused")
    assert torch.equal(value, expected)
    assert not value.requires_grad
    assert len(seen) == (0 if case.loss == "spectral" else 1)
    assert all(x is None for sides in seen for x in sides)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of inductor itself
@pytest.mark.parametrize("case", [SMALL[0], *(pytest.param(x, marks=pytest.mark.slow) for x in SMALL[1:])], ids=str)
def test_compiled_as_one_graph(case: LossCase, device: str) -> None:
    """The operators are opaque to the compiler: only the scalar work around them may be rounded otherwise."""
    z = case.make_z(device).requires_grad_()
    learned = {name: torch.tensor(x, device=device, requires_grad=True) for name, x in case.learned.items()}
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(lambda z, learned: case.compute(z, learned, "fused"), fullgraph=True, backend=backend)
    value = compiled(z, learned)
    results = [value.detach(), *torch.autograd.grad(value, [z, *learned.values()])]
    for x, expected in zip(results, run_loss(case, "fused", device).values(), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
