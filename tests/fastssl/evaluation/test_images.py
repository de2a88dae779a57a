"""The engine of an evaluation's loaders fits the file that they read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl.evaluation.images import engine_for
from pipelines.loader import DataConfig

ONE_SIZE, SIZES = np.full((3, 2), 32), np.array([[32, 32], [40, 32], [32, 32]])


@pytest.mark.parametrize(
    ("sizes", "engine", "device", "taken"),
    [
        (SIZES, "resident", "cuda", "ffcv"),
        (ONE_SIZE, "resident", "cuda", "resident"),
        (SIZES, "resident", "cpu", "resident"),
        (SIZES, "dali", "cuda", "dali"),
    ],
)
def test_images_of_several_sizes_are_evaluated_after_a_training_on_resident_ones(sizes, engine, device, taken):
    found = engine_for(DataConfig(engine=engine), SimpleNamespace(sizes=sizes), torch.device(device))
    assert found.engine == taken
