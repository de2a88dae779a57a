"""A training in the caller's process leaves its torch as it was."""

import pytest
import torch

from fastssl.config import RunConfig
from fastssl.processes import launch


@pytest.fixture
def start_on(monkeypatch: pytest.MonkeyPatch):
    """Sets the device of a start without a process group."""

    def set_device(device: str) -> None:
        def start_process(_: RunConfig) -> torch.device:
            torch.backends.cudnn.benchmark = True  # as on a GPU
            return torch.device(device)

        monkeypatch.setattr(launch, "start_process", start_process)
        monkeypatch.setattr(launch.Watchdog, "watch", lambda *_: None)

    return set_device


def test_cudnn_does_not_go_on_to_time_its_kernels(start_on) -> None:
    """An evaluation in this process has batches of other sizes, and would time them for each."""
    start_on("cpu")
    assert not torch.backends.cudnn.benchmark
    with launch.started_process(RunConfig()):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_caller_has_its_stream_again(start_on) -> None:
    start_on("cuda")
    before = torch.cuda.current_stream()
    with launch.started_process(RunConfig()):
        torch.cuda.set_stream(torch.cuda.Stream())  # as a captured step does
        assert torch.cuda.current_stream() != before
    assert torch.cuda.current_stream() == before
