"""The images of an evaluation: the engine of its loaders fits the file that they read, and what is seen counts."""

import io
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastssl.evaluation.config import EvalConfig
from fastssl.evaluation.images import Images, Part, engine_for
from pipelines.beton import BetonReader, BetonWriter
from pipelines.engines import decode_crop
from pipelines.engines.jpeg_region import why_no_region_decoder
from pipelines.errors import DataError
from pipelines.loader import DataConfig
from pipelines.views import ViewsConfig

ONE_SIZE, SIZES = np.full((3, 2), 32), np.array([[32, 32], [40, 32], [32, 32]])
CPU = torch.device("cpu")


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


def write_noise(path: Path, *, is_cut_short: bool = False) -> BetonReader:
    """Three JPEGs that are decoded in part; of the last, the lower third may be missing."""
    rng = np.random.default_rng(0)
    with BetonWriter(path, 3) as writer:
        for i in range(3):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (200, 240, 3), dtype=np.uint8)).save(file, "JPEG", quality=90)
            data = file.getvalue()
            assert len(data) * 2 // 3 >= decode_crop.REGION_MIN_BYTES
            stored = data[: len(data) * 2 // 3] if is_cut_short and i == 2 else data
            writer.write_jpeg(stored, height_px=200, width_px=240, label=i)
    return BetonReader(path)


def views_of_epochs(reader: BetonReader, num_epochs: int) -> list[torch.Tensor | None]:
    """The random views of each epoch, in the order of the images; None: a damaged image ended it."""
    part, found = Part(reader=reader, ids=np.arange(3)), []
    cfg = EvalConfig(sgd_batch_size=3, augment={"crop_scale": (0.05, 0.3)})
    views = ViewsConfig(recipe="simsiam_small", size_px=24)
    images = Images(cfg, DataConfig(num_workers=1), views, nn.Identity(), train=part, test=part, device=CPU)
    with closing(images):
        for epoch in range(num_epochs):
            try:
                ((batch, positions),) = images.augmented(np.arange(3), 0, epoch)[1]
                found.append(batch[positions.argsort()].clone())
            except DataError as error:
                if "image 2 cannot be decoded (Premature end of JPEG file)" not in str(error):
                    raise
                found.append(None)
    return found


def test_random_views_have_the_pixels_of_full_decodings_and_damage_below_them_does_not_count(tmp_path, monkeypatch):
    assert why_no_region_decoder() is None
    whole = write_noise(tmp_path / "whole.beton")
    cut = write_noise(tmp_path / "cut.beton", is_cut_short=True)
    views, views_of_cut = views_of_epochs(whole, 12), views_of_epochs(cut, 12)
    good = [view for view in views_of_cut if view is not None]
    assert 3 <= len(good) <= 9
    monkeypatch.setattr(decode_crop, "why_no_region_decoder", lambda: "not compiled")
    expected = views_of_epochs(whole, 12)
    torch.testing.assert_close(views, expected, rtol=0, atol=0)
    of_good = [view for view, of_cut in zip(expected, views_of_cut, strict=True) if of_cut is not None]
    torch.testing.assert_close(good, of_good, rtol=0, atol=0)
    assert views_of_epochs(cut, 12) == [None] * 12
