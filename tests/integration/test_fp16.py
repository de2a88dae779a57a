"""A training in fp16 that is killed goes on with its loss scale; on a GPU a rounding may differ, the scale must not."""

import subprocess

import pytest
import torch

from fastssl.checkpoint.save_load import last_checkpoint
from tests.helpers.processes import ROOT, environment
from tests.helpers.runs import assert_same_end
from tests.integration.test_training import TRAIN, kill_after_step, losses, run_of

NUM_STEPS = 20  # two epochs of ten


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_killed_run_goes_on_with_its_loss_scale(device, zero_stage, tiny_config):
    settings = [f"run.device={device}", "data.engine=resident", f"train.zero_stage={zero_stage}"]
    settings += ["train.precision=fp16", "run.checkpoint_every_steps=3"]
    arguments = [*TRAIN, str(tiny_config), "--set", *settings]
    whole, run = tiny_config.parent / "whole", run_of(tiny_config)
    train(*arguments, f"run.dir={whole}", device=device)
    kill_after_step(arguments, run, step=14, device=device)
    train(*arguments, "run.resume=auto", device=device)

    scale = loss_scale(whole)
    assert scale["cur_iter"] == NUM_STEPS  # not what a scaler has that begins again
    assert loss_scale(run) == scale
    rows, resumed_rows = losses(whole), losses(run)
    assert [(row["step"], row.get("loss_scale")) for row in resumed_rows] == [
        (row["step"], row.get("loss_scale")) for row in rows
    ]
    if device == "cpu":
        assert_same_end(whole, run)


def train(*arguments: str, device: str) -> None:
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(device), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def loss_scale(run) -> dict[str, float]:
    folder = last_checkpoint(run / "checkpoints")
    assert folder is not None
    return torch.load(folder / "state.pt", weights_only=True)["loss_scale"]
