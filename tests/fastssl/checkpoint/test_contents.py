"""A checkpoint that was written whole, of something else."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastssl.checkpoint.contents import check_contents
from fastssl.checkpoint.tensor_file import DamagedError
from fastssl.machine.private_api import COUNTERS

SHARED = "state", "engine"


@pytest.fixture
def engine():
    return SimpleNamespace(module=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


@pytest.fixture
def saved(engine):
    """{"state": content of state.pt, "own": content of rank_0.pt} at step 7 of 10."""
    parameters = {name: value.detach().clone() for name, value in engine.module.named_parameters()}
    shared = {
        "parameters": parameters,
        "buffers": dict(engine.module.named_buffers()),
        "optimizer": {name: {"momentum_buffer": torch.zeros_like(value)} for name, value in parameters.items()},
        "counters": dict.fromkeys(COUNTERS, 7),
    }
    return {"state": {"engine": shared, "step": 7}, "own": {"buffers": {"1.running_mean": torch.zeros(4)}}}


def check(saved, engine, step=7):
    check_contents(saved["state"], saved["own"], engine, step=step, total_steps=10)


def test_its_own_state_fits(saved, engine):
    check(saved, engine)
    saved["state"]["engine"]["optimizer"]["0.weight"]["step"] = torch.tensor(7.0)
    check(saved, engine)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("state", "step"), -1, "its step is -1, in a checkpoint of step 7 of 10"),
        (("state", "step"), True, "its step is True"),
        (("state", "step"), 7.0, "its step is 7.0"),
        ((*SHARED, "parameters"), {}, "it has other parameters than the model"),
        ((*SHARED, "parameters", "0.weight"), torch.zeros(1), r"parameter 0.weight has shape \[1\]"),
        ((*SHARED, "parameters", "0.bias"), torch.tensor(0.0), r"parameter 0.bias has shape \[\]"),
        ((*SHARED, "parameters", "2.weight"), torch.zeros(1), "it has other parameters than the model"),
        ((*SHARED, "buffers", "1.running_var"), torch.ones(1), r"buffer 1.running_var has shape \[1\]"),
        (("own", "buffers", "1.running_mean"), torch.ones(1), r"buffer 1.running_mean has shape \[1\]"),
        (("own", "buffers", "0.other"), torch.ones(4), "it has other buffers"),
        ((*SHARED, "optimizer", "9.weight"), {}, "the optimizer's state of other parameters"),
        ((*SHARED, "optimizer", "0.weight", "momentum_buffer"), torch.zeros(3, 4), r"0.weight has shape \[3, 4\]"),
        ((*SHARED, "counters", "global_steps"), -1, "its counters are not counts"),
        ((*SHARED, "counters", "module"), 1, "its counters are not counts"),
    ],
)
def test_what_does_not_fit_is_named(path, value, message, saved, engine):
    place = saved
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(DamagedError, match=message):
        check(saved, engine)


def test_a_step_beyond_the_run_does_not_fit(saved, engine):
    saved["state"]["step"] = 11
    with pytest.raises(DamagedError, match="its step is 11, in a checkpoint of step 11 of 10"):
        check(saved, engine, step=11)
