"""The losses with fused kernels on a GPU: the cases of fused_loss_cases.py, and more rows, memory, waiting, compiling.

# V views of B samples, D width
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.helpers.loss_three_way import LossCase, assert_loss_three_way, run_loss
from tests.kernels.fused_loss_cases import *  # noqa: F403 - the same cases, with the device below
from tests.kernels.fused_loss_cases import (
    COLD,
    COLDEST,
    LEARNED,
    NEGATIVES,
    NT_XENT,
    SIGLIP,
    VIEWS,
    gram_case,
    learning_pair_case,
    pair_case,
    partition_case,
)
from tests.kernels.similarity.fused_cases import slow_but

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
]

MIB = 2**20
LARGE = {"num_samples": 1111, "width": 128}
LARGE_CASES = [
    *(pair_case(negatives, "softplus", COLD, **LARGE) for negatives in NEGATIVES),
    *(learning_pair_case(negatives, **LARGE) for negatives in NEGATIVES),
    *(partition_case(form, views, **LARGE) for form in ("nt_xent", "dcl", "dclw") for views in ("self2", "cross")),
    partition_case("nt_xent", "self3", groups=True, **LARGE),
    *(gram_case(form, views, **LARGE) for form in ("spectral", "quadratic") for views in VIEWS),
    learning_pair_case("softplus", learned=LEARNED | {"inv_temperature": COLDEST}, **LARGE),
    partition_case("nt_xent", t=COLDEST, **LARGE),
]
OTHER_SIZES = [
    [
        replace(case, num_samples=num_samples, width=width)
        for num_samples, width in ((2049, 64), (777, 200), (777, 256), (777, 768), (333, 2048))
    ]
    for case in (pair_case("jensen", "softplus", COLD, "self3"), SIGLIP, NT_XENT, gram_case("quadratic", "self2"))
]
# Each loss in strips, and each size once: the others compile the same paths for another width.
QUICK_SIZES = [*(cases[3] for cases in OTHER_SIZES), *(OTHER_SIZES[i][j] for i, j in ((0, 0), (1, 1), (2, 2), (3, 4)))]
# n = V B = 65536 rows: what the fused kernels are for.
MANY = {"num_samples": 32768, "width": 128, "dtype": torch.bfloat16, "rows": "random"}
MANY_CASES = [
    pair_case("softplus", "softplus", COLD, **MANY),
    pair_case("exp", "linear", COLD, **MANY),
    partition_case("nt_xent", **MANY),
]


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.mark.parametrize("rows", ["random", "clustered"])
@pytest.mark.parametrize("case", [*LARGE_CASES, *slow_but(QUICK_SIZES, itertools.chain(*OTHER_SIZES))], ids=str)
def test_many_rows_three_way(case: LossCase, rows: str, device: str) -> None:
    assert_loss_three_way(replace(case, rows=rows), device)


@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_many_rows_give_the_same_bits(case: LossCase, device: str) -> None:
    first, second = run_loss(case, "fused", device), run_loss(case, "fused", device)
    assert all(x.isfinite().all() for x in first.values())
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def step(case: LossCase, device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Forward and backward into .grad, and the leaves that have it."""
    z = case.make_z(device).requires_grad_()
    learned = {name: torch.tensor(x, device=device, requires_grad=True) for name, x in case.learned.items()}

    def run() -> Tensor:
        for x in (z, *learned.values()):
            x.grad = None
        value = case.compute(z, learned, "fused")
        value.backward()
        return value.detach()

    return run, [z, *learned.values()]


@pytest.mark.parametrize("case", MANY_CASES, ids=str)
def test_memory_of_forward_and_backward(case: LossCase, device: str) -> None:
    """At most 60 MB at 65536 x 128 in bf16, beyond the rows (16.8 MB) and their gradient (16.8 MB).

    It is the peak of what torch's allocator handed out from before the forward to after the backward, with z already
    there, less that z, and less dz, which is an output. It holds u in fp16 (16.8 MB) and the pulls in fp32 (33.6 MB).
    """
    run, leaves = step(case, device)
    run()  # compiles
    z = leaves[0]
    for x in leaves:
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # z among it
    run()
    torch.cuda.synchronize()
    assert z.grad is not None
    extra = torch.cuda.max_memory_allocated() - before - z.grad.numel() * z.grad.element_size()
    assert extra <= 60e6, f"{extra / 1e6:.1f} MB"


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")  # that it is a prototype
@pytest.mark.parametrize(
    "case",
    [replace(case, num_samples=513, width=128) for case in (SIGLIP, NT_XENT, pair_case("jensen", "linear", COLD))]
    + [gram_case("spectral", "cross"), replace(SIGLIP, width=300), replace(NT_XENT, groups=True)],
    ids=str,
)
def test_nothing_waits_for_the_device(case: LossCase, device: str) -> None:
    run, _ = step(case, device)
    expected = run()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        value = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(value, expected)
