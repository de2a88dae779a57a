"""Which images are evaluated on, and how many of them are training images too."""

import numpy as np
from PIL import Image

from fastssl.evaluation.parts import choose_parts, duplicates_across
from pipelines.beton import BetonReader
from pipelines.convert import convert
from pipelines.loader import DataConfig
from pipelines.sampler import split_holdout


def test_held_out_images_that_are_training_images_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(40):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((80, 60))
        for name in ("1", "2") if k < 10 else ("1",):
            path = tmp_path / "images" / "ab"[k % 2] / f"{k}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    train = str(convert("folder", str(tmp_path / "images"), tmp_path / "x.beton").out)
    data = DataConfig(train=train, holdout_fraction=0.4)
    fit, held_out, where = choose_parts(data)
    assert where == f"0.4 of {train}, held out (data.test is not set)"
    reader = BetonReader(train)
    assert reader.hashes is not None
    fit_ids, held_out_ids = split_holdout(reader.num_samples, 0.4, reader.labels)
    num_copies = np.isin(reader.hashes[held_out_ids, 0], reader.hashes[fit_ids, 0]).sum()
    assert num_copies > 0
    expected = f"; of these 20 images, {num_copies} are copies of training images and 0 more look almost like one"
    assert duplicates_across(fit, held_out) == expected
    assert len(held_out.ids) == 20

    fit, test, where = choose_parts(DataConfig(train=train, test=train))
    assert where == train
    expected = "; of these 50 images, 50 are copies of training images and 0 more look almost like one"
    assert duplicates_across(fit, test) == expected
    (tmp_path / "x.beton.hashes").unlink()
    fit, test, where = choose_parts(DataConfig(train=train, test=train))
    assert (where, duplicates_across(fit, test)) == (train, "")
