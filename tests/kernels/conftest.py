"""Shared by the fused kernels' cases in Triton's interpreter and on a GPU."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> str:
    """Where cases run; test_*_gpu.py files have another."""
    return "cpu"


@pytest.fixture
def unwritten_memory_is_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel does not write, or reads too early, makes its results NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic torch refuses cuBLAS without it
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1, device=device).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
