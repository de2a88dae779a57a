"""Which implementation is taken, and what is said about it."""

import logging
from types import SimpleNamespace

import pytest
import torch

import kernels.similarity
from kernels.similarity import IMPLS, MAX_WIDTH, choose_impl, load_impl


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.similarity._say_choice.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_auto_is_chunked_on_the_cpu(dtype: torch.dtype) -> None:
    assert choose_impl("auto", torch.zeros(2, 4, 8, dtype=dtype)) == "chunked"


@pytest.mark.parametrize(
    ("capability", "auto", "fused_runs"),
    [
        ((7, 5), "chunked", False),
        ((8, 0), "chunked", True),
        ((8, 9), "chunked", True),
        ((9, 0), "fused", True),
        ((10, 0), "fused", True),
    ],
)
def test_auto_is_fused_from_capability_9_on(capability, auto: str, fused_runs: bool, monkeypatch) -> None:
    """Older devices run it where it is asked for."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    z = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(2, 4, 8))
    assert choose_impl("auto", z) == auto
    if fused_runs:
        assert choose_impl("fused", z) == "fused"
    else:
        with pytest.raises(ValueError, match=r"older than compute capability 8\.0"):
            choose_impl("fused", z)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_wish_is_kept_and_its_module_has_the_three_functions(impl) -> None:
    assert choose_impl(impl, torch.zeros(2, 4, 8)) == impl
    module = load_impl(impl)
    assert all(callable(getattr(module, name)) for name in ("normalize", "accumulate", "finish"))


@pytest.mark.parametrize(
    ("impl", "z", "message"),
    [
        ("cuda", torch.zeros(2, 4, 8), f"impl must be one of {', '.join(IMPLS)}, got 'cuda'"),
        ("fused", torch.zeros(2, 4, 8), "impl fused: it needs a CUDA device .* the rows are on cpu"),
        ("fused", torch.zeros(2, 4, 8, dtype=torch.float64), "impl fused: fp64 is for chunked and reference"),
        ("fused", torch.zeros(2, 4, MAX_WIDTH + 1), f"rows are at most {MAX_WIDTH} wide, got {MAX_WIDTH + 1}"),
    ],
)
def test_refusals_name_the_reason(impl, z: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_impl(impl, z)


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kernels.similarity"):
        for _ in range(3):
            choose_impl("auto", torch.zeros(2, 4, 8))
        choose_impl("chunked", torch.zeros(2, 4, 8))  # a wish is no choice
    assert [record.getMessage() for record in caplog.records] == [
        "pair losses: chunked kernels for float32 rows of width 8 on cpu"
    ]
    with caplog.at_level(logging.INFO, logger="kernels.similarity"):
        choose_impl("auto", torch.zeros(2, 4, 16))
    assert len(caplog.records) == 2
