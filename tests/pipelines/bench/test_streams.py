"""What is measured: every image of the file, again and again, and nothing else."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipelines.bench.streams import Job, build_job_loader, open_decode, open_engine
from pipelines.beton import BetonReader, BetonWriter
from pipelines.errors import DataError
from pipelines.views import ViewsConfig
from tests.pipelines.engines.test_engines import make_jpegs, write_jpegs

VIEWS = ViewsConfig(recipe="byol", size_px=32)


def job_on(path: Path, *, batch_size: int = 4) -> Job:
    return Job(beton=str(path), views=VIEWS, batch_size=batch_size, num_threads=2, seed=0)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> BetonReader:
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", make_jpegs(10))


def test_the_bare_decoder_decodes_batch_by_batch(jpegs):
    stream = open_decode(job_on(jpegs.path))
    assert [next(stream.batches) for _ in range(3)] == [None] * 3
    stream.batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_bare_decoding_is_refused_for_raw_images(tmp_path):
    path = tmp_path / "raw.beton"
    with BetonWriter(path, 4) as writer:
        for _ in range(4):
            writer.write_raw(np.zeros((8, 8, 3), np.uint8), label=0)
    with pytest.raises(ValueError, match="not stored as JPEG"):
        open_decode(job_on(path))


@pytest.mark.parametrize("engine", ["ffcv", "resident"])
def test_an_epoch_holds_a_small_files_images_several_times_over(jpegs, engine):
    loader = build_job_loader(job_on(jpegs.path), engine=engine)
    assert len(loader) == 10_000 // 4
    epoch = loader.epoch(0)
    batches = [(batch.sample_ids.clone(), batch.labels.clone()) for batch in islice(epoch, 25)]
    epoch.close()
    loader.close()
    ids = np.concatenate([ids for ids, _ in batches])
    assert set(ids.tolist()) == set(range(10))
    for sample_ids, labels in batches:
        assert labels.tolist() == jpegs.labels[sample_ids].tolist()


def test_the_resident_engine_holds_each_image_once(jpegs):
    loader = build_job_loader(job_on(jpegs.path), engine="resident")
    inner = loader._engine._engine  # pyright: ignore[reportAttributeAccessIssue]
    assert inner._decoded.pixels.nbytes == 3 * int(jpegs.sizes.prod(1).sum())
    loader.close()


def test_an_engine_that_cannot_serve_says_so(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_engine(job_on(tmp_path / "nowhere.beton"), engine="ffcv")
