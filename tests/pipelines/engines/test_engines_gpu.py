"""Batches that are made on a GPU are those of the CPU: same order, same draws, nearly the same pixels."""

import numpy as np
import pytest
import torch

from pipelines.beton import BetonReader, BetonWriter
from pipelines.engines import build_engine
from pipelines.engines.turbojpeg import load_library
from pipelines.errors import DataError
from pipelines.loader import DataConfig, build_loader
from pipelines.views import ViewsConfig, build_view_specs, size_groups
from tests.helpers.plans import draw_of, plan_batches
from tests.pipelines.engines.test_engines import encode, make_photograph, write_jpegs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

VIEWS = ViewsConfig(recipe="byol", size_px=48, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
# Mean distance in levels of 255. A resampler's tie may fall to either side; nvJPEG decodes with another DCT.
RAW_LEVELS, NVJPEG_LEVELS = 0.05, 1.0


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> BetonReader:
    path = tmp_path_factory.mktemp("raw") / "raw.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, 64) as writer:
        for i in range(64):
            writer.write_raw(make_photograph(rng, 60, 80), label=i % 5)
    return BetonReader(path)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> BetonReader:
    rng = np.random.default_rng(1)
    files = [encode(make_photograph(rng, 90 + i, 120 - i)) for i in range(32)]
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", files)


def skip_without_ffcv() -> None:
    """FFCV's library decodes JPEGs."""
    try:
        load_library()
    except DataError as error:
        pytest.skip(str(error))


def batches(reader: BetonReader, engine: str, device: str) -> list:
    cfg = DataConfig(train=str(reader.path), engine=engine, global_batch_size=16)  # pyright: ignore
    place = {"rank": 0, "world_size": 1, "device": torch.device(device), "num_threads": 2}
    loader = build_loader(reader, cfg, VIEWS, seed=3, **place)
    try:
        return [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    finally:
        loader.close()


def assert_nearly_equal(reader: BetonReader, engine: str, mean_levels: float) -> None:
    if engine == "dali":
        pytest.importorskip("nvidia.dali")
    for ours, expected in zip(batches(reader, engine, "cuda"), batches(reader, "resident", "cpu"), strict=True):
        assert torch.equal(ours.sample_ids.cpu(), expected.sample_ids)
        assert torch.equal(ours.labels.cpu(), expected.labels)
        for view, on_cpu in zip(ours.views, expected.views, strict=True):
            assert view.is_cuda
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert 255 * (view.cpu() - on_cpu).abs().mean() <= mean_levels


@pytest.mark.parametrize("engine", ["ffcv", "dali", "resident"])
def test_raw_images(raw, engine):
    assert_nearly_equal(raw, engine, RAW_LEVELS)


@pytest.mark.parametrize(("engine", "mean_levels"), [("ffcv", RAW_LEVELS), ("dali", NVJPEG_LEVELS)])
def test_jpegs(jpegs, engine, mean_levels):
    skip_without_ffcv()
    assert_nearly_equal(jpegs, engine, mean_levels)


def test_views_of_dali_are_copied_before_it_takes_their_memory_again(raw):
    """With so much to do on the consumer's stream that a copy behind it comes long after the next batches are made."""
    pytest.importorskip("nvidia.dali")
    specs, device = build_view_specs(VIEWS), torch.device("cuda")

    def views(busy_cycles: int) -> list[torch.Tensor]:
        engine = build_engine("dali", raw, num_workers=2, prefetch_batches=2, device=device)
        kept = []
        plans = plan_batches(draw_of(specs), np.arange(64), raw, 4)
        for batch in engine.batches(plans, 4, size_groups(specs)):
            kept += [view.clone() for view in batch.views]
            torch.cuda._sleep(busy_cycles)
        engine.close()
        torch.cuda.synchronize()
        return kept

    idle, busy = views(0), views(20_000_000)
    assert all(torch.equal(a, b) for a, b in zip(idle, busy, strict=True))


def test_resident_images_must_be_of_one_size(jpegs):
    with pytest.raises(DataError, match="engine resident needs images of one size on a GPU"):
        batches(jpegs, "resident", "cuda")
