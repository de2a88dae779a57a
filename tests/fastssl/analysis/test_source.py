"""Analyses compute in fp32 proper, on a GPU too."""

from pathlib import Path

import pytest
import torch

from fastssl.analysis import gradflow, gradnorm, hessian
from fastssl.analysis.gradflow import gradflow as run_gradflow
from fastssl.analysis.gradnorm import gradnorm as run_gradnorm
from fastssl.analysis.hessian import HessianSettings, hessian_of_runs
from fastssl.analysis.source import BatchSettings

CALLS = (
    (hessian, lambda: hessian_of_runs([Path("a")], settings=HessianSettings())),
    (gradflow, lambda: run_gradflow(Path("a"), settings=BatchSettings())),
    (gradnorm, lambda: run_gradnorm(Path("a"))),
)


@pytest.mark.parametrize(("module", "call"), CALLS)
def test_an_analysis_rounds_no_factor_to_tf32_and_leaves_the_setting_as_it_was(module, call, monkeypatch):
    allowed = []

    def stop(*_):
        allowed.append(torch.backends.cudnn.allow_tf32)
        raise KeyError

    monkeypatch.setattr(module, "open_run", stop)
    before = torch.backends.cudnn.allow_tf32
    assert before
    with pytest.raises(KeyError):
        call()
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32 == before
