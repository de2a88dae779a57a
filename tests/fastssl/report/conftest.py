"""A tiny run whose folder and classes have names that try to be HTML."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.beton import BetonWriter
from tests.helpers.runs import train_tiny_run

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on 60 images of three classes."""
    folder = tmp_path_factory.mktemp("report")
    levels = np.random.default_rng(0).integers(0, 256, (60, 40, 48, 3), dtype=np.uint8)
    beton = folder / "images.beton"
    with BetonWriter(beton, len(levels), class_names=[HOSTILE, "</script><b>", "c"]) as writer:
        for number, image in enumerate(levels):
            writer.write_raw(image, label=number % 3)
    train_tiny_run(beton, folder / HOSTILE)
    return folder / HOSTILE
