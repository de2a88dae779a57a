"""The fused kernels on a GPU: the cases of fused_cases.py, and more rows, in the tiles of production."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.helpers.three_way import Case, assert_three_way, make_inputs, run
from tests.kernels.similarity.fused_cases import *  # noqa: F403 - the same cases, with the device below
from tests.kernels.similarity.fused_cases import KINDS, slow_but

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
]

WIDTHS = (16, 32, 64, 100, 128, 200, 256, 300, 768, 2048)  # each configuration of the tiles; 300 and wider: strips
HALF_DTYPES = (torch.float16, torch.bfloat16)
SHAPES = {
    "symmetric": {"symmetric": True},
    "more columns": {"num_blocks": 3, "own": 1},
    "other samples": {"num_blocks": 4, "own": None},
    "groups": {"symmetric": True, "groups": True},
    "weights": {"symmetric": True, "weight": 1e-3},
    "weights of two sides": {"num_blocks": 3, "own": 1, "weight": 3.0},
}
# The quick cases compile each path of the kernels: each kind of f with plain sides, groups and weights, in tiles and in
# strips; each width with one kind of f. The dtype of z changes `normalize` only, and the rows' values change nothing.
QUICK_WIDTHS = [
    *(("exp", width) for width in WIDTHS),
    *((kind, width) for kind in ("softplus", "square") for width in (64, 128, 256, 300, 768, 2048)),
]
QUICK_SHAPES = [
    *((kind, shape, 128, torch.bfloat16) for kind in KINDS for shape in SHAPES),
    *(("exp", shape, 300, torch.bfloat16) for shape in SHAPES),
    *((kind, shape, 300, torch.bfloat16) for kind in KINDS[1:] for shape in ("symmetric", "groups", "weights")),
    *((kind, "symmetric", width, torch.float16) for kind in KINDS for width in (128, 300)),
    *(("exp", shape, width, torch.float16) for shape in ("groups", "weights") for width in (64, 256)),
]


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.mark.parametrize("clustered", [False, True], ids=["random", "clustered"])
@pytest.mark.parametrize(("kind", "width"), slow_but(QUICK_WIDTHS, itertools.product(KINDS, WIDTHS)))
def test_many_rows_three_way(kind: str, width: int, clustered: bool, device: str) -> None:
    case = Case(kind=kind, t=20.0, log2_exp_b=-14, num_samples=1111, width=width, symmetric=True, clustered=clustered)
    assert_three_way(replace(case, device=device))


@pytest.mark.parametrize(
    ("kind", "shape", "width", "dtype"),
    slow_but(QUICK_SHAPES, itertools.product(KINDS, SHAPES, [64, 128, 256, 300], HALF_DTYPES)),
)
def test_every_kind_of_sides_three_way(kind: str, shape: str, width: int, dtype: torch.dtype, device: str) -> None:
    case = Case(kind=kind, num_samples=333, width=width, clustered=True, log2_exp_b=-1, **SHAPES[shape])
    assert_three_way(replace(case, dtype=dtype, device=device))


@pytest.mark.parametrize("num_samples", [63, 64, 65, 127, 129, 2049])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_around_a_tile(kind: str, num_samples: int, device: str) -> None:
    assert_three_way(Case(kind=kind, num_samples=num_samples, width=128, num_blocks=3, own=1, device=device))


@pytest.mark.parametrize("width", slow_but([128, 768], [64, 128, 256, 768]))
@pytest.mark.parametrize(("kind", "weight"), [("softplus", None), ("exp", None), ("exp", 1.0), ("square", None)])
def test_many_rows_give_the_same_bits(kind: str, weight: float | None, width: int, device: str) -> None:
    """Also with few programs, whose columns are shared out (num_samples 700), and with many."""
    for num_samples in (700, 5000):
        case = Case(kind=kind, weight=weight, num_samples=num_samples, width=width, symmetric=True, device=device)
        inputs = make_inputs(case)
        (first, _), (second, _) = run("fused", case, inputs), run("fused", case, inputs)
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in case.wanted)
