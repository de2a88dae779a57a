"""What must work where torch, Triton, numpy and pytest are installed, but nothing of `ABSENT`: many a GPU machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

ABSENT = ("pydantic", "deepspeed", "ffcv", "nvidia.dali")
HIDE = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in {ABSENT}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""
LOAD_RAW_IMAGES = """
import numpy as np
import torch
from pipelines.beton import BetonReader, BetonWriter
from pipelines.engines import build_engine
from pipelines.loader import DataConfig, build_loader
from pipelines.views import ViewsConfig

path = sys.argv[1]
images = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)
with BetonWriter(path) as writer:
    for label, image in enumerate(images):
        writer.write_raw(image, label=label)
place = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": 1}
for engine in ("ffcv", "resident"):
    cfg = DataConfig(train=path, engine=engine, global_batch_size=8)
    loader = build_loader(BetonReader(path), cfg, ViewsConfig(size_px=16), seed=0, **place)
    (batch,) = loader.epoch(0)
    assert sorted(batch.labels.tolist()) == list(range(8))
    assert [view.shape for view in batch.views] == [(8, 3, 16, 16)] * 2
    loader.close()
"""
IMPORT_BENCHMARKS = """
import runpy
sys.path.insert(0, "benchmarks")
for name in ("bench_loss", "bench_augment"):
    runpy.run_path(f"benchmarks/{name}.py")
from fastssl.tracking.result_rows import environment_columns
assert environment_columns(("torch",))["torch"]
"""
COLLECT = """
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def run_without_packages(code: str, *arguments: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", HIDE + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_raw_images_are_loaded(tmp_path: Path):
    run_without_packages(LOAD_RAW_IMAGES, tmp_path / "raw.beton")


def test_benchmarks_of_the_kernels_start():
    pytest.importorskip("triton")
    run_without_packages(IMPORT_BENCHMARKS)


def test_gpu_tests_are_collected():
    """All files with such a test; those whose code needs one of the packages are skipped."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    collected = run_without_packages(COLLECT, *files)
    for name in ("kernels/similarity", "kernels/augment", "kernels", "pipelines/engines"):
        assert f"tests/{name}/test_" in collected
