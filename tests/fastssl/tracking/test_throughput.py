"""What a run says of its arithmetic."""

import pytest
import torch

from fastssl.losses import MioConfig, build_loss
from fastssl.losses.byol import ByolConfig
from fastssl.models.config import ModelConfig
from fastssl.models.objective import Objective
from fastssl.models.two_view import TwoViewModel
from fastssl.tracking.throughput import flops_per_image, peak_tflops

# Multiply-adds of ResNet-18's convolutions at 224 px, counted by hand; with the classifier 1.8e9 in He et al. 2016.
STEM = 112 * 112 * 64 * 3 * 49
STAGE_1 = 4 * 56 * 56 * 64 * 64 * 9
STAGE = 28 * 28 * 128 * (64 * 9 + 3 * 128 * 9 + 64)  # each of stages 2 to 4: half the side, twice the width
PROJECTOR = 512 * 512 + 512 * 128


@pytest.mark.parametrize(("config", "passes"), [(MioConfig(), 3), (ByolConfig(predictor_hidden=8), 4)])
def test_an_image_costs_three_forward_passes_and_the_targets(config, passes):
    model = TwoViewModel(ModelConfig(backbone="resnet18", projector_hidden=(512,), projector_dim=128), 224)
    objective = Objective(model, build_loss(config, 128))
    forward = 2 * (STEM + STAGE_1 + 3 * STAGE + PROJECTOR)
    assert flops_per_image(objective, [(3, 224, 224)] * 2) == 2 * passes * forward
    assert next(model.parameters()).device.type == "cpu"  # a copy was counted


def test_a_small_crop_is_not_seen_by_the_target():
    objective = Objective(TwoViewModel(ModelConfig(backbone="resnet18"), 64), build_loss(ByolConfig(), 128))
    large, both = (flops_per_image(objective, shapes) for shapes in ([(3, 64, 64)] * 2, [(3, 64, 64), (3, 32, 32)]))
    assert both is not None
    assert large is not None
    assert both < large * (4 + 3 / 4) / 8 * 1.01  # a quarter of the pixels, and no pass of the target


def test_a_cpus_peak_is_not_known():
    assert peak_tflops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA A100-SXM4-80GB", (312, 156)),
        ("NVIDIA H200", (989, 494.5)),
        ("NVIDIA H100 PCIe", (None, None)),  # slower than the one on a board of its own, and not in the table
        ("NVIDIA A10", (None, None)),
    ],
)
def test_a_gpus_peak_is_that_of_its_own_name(name, peaks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert tuple(peak_tflops(torch.device("cuda"), precision) for precision in ("bf16", "fp32")) == peaks
