"""Shared by the fused kernels' cases in Triton's interpreter and on a GPU."""

import os
from collections.abc import Iterator

import pytest
import torch

# Deterministic torch refuses cuBLAS without it, and looks once in a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases marked slow_on_gpu are slow where kernels are compiled: others there compile the same paths."""
    for item in items:
        if item.get_closest_marker("gpu") and item.get_closest_marker("slow_on_gpu"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def device() -> str:
    """Where cases run; test_*_gpu.py files have another."""
    return "cpu"


@pytest.fixture
def unwritten_memory_is_nan(device: str) -> Iterator[None]:
    """What a kernel does not write, or reads too early, makes its results NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1, device=device).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
