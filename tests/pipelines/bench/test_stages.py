"""The stages of the loader, each alone."""

import os

import numpy as np
import pytest
import torch

from pipelines.bench.stages import COPY, measure_stages
from pipelines.bench.streams import Job
from pipelines.beton import BetonReader, BetonWriter
from pipelines.views import ViewsConfig
from tests.pipelines.engines.test_engines import make_jpegs, write_jpegs
from tests.pipelines.engines.test_engines_gpu import skip_without_ffcv


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> BetonReader:
    return write_jpegs(tmp_path_factory.mktemp("jpegs") / "jpegs.beton", make_jpegs(10))


def job_on(reader: BetonReader, device: str = "cpu") -> Job:
    views = ViewsConfig(recipe="byol", size_px=32)
    return Job(beton=str(reader.path), views=views, batch_size=4, num_threads=2, seed=0, device=device)


def test_every_stage_of_jpegs_is_timed_on_one_core_which_is_left_again(jpegs):
    cores, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    stages_s = measure_stages(job_on(jpegs), num_repetitions=2, share=0.05)
    assert list(stages_s) == ["draw", "decode", "crop and resize", "pixel op", "loader"]
    assert all(0 < stages_s[name] < 1 for name in ("draw", "decode", "pixel op", "loader"))
    assert stages_s["decode"] < stages_s["loader"]
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == num_threads


def test_raw_images_have_no_decoding(tmp_path):
    path = tmp_path / "raw.beton"
    with BetonWriter(path, 8) as writer:
        for _ in range(8):
            writer.write_raw(np.zeros((40, 40, 3), np.uint8), label=0)
    stages_s = measure_stages(job_on(BetonReader(path)), num_repetitions=1, share=0.01)
    assert list(stages_s) == ["draw", "crop and resize", "pixel op", "loader"]
    assert stages_s["crop and resize"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_copy_is_a_stage(jpegs):
    skip_without_ffcv()
    stages_s = measure_stages(job_on(jpegs, "cuda:0"), num_repetitions=1, share=0.05)
    assert list(stages_s) == ["draw", "decode", "crop and resize", "pixel op", COPY, "loader"]
    assert 0 < stages_s[COPY] < 1
    assert 0 < stages_s["pixel op"] < 1
