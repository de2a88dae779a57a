"""How long one waits: for the command line, for the first batch; and that nothing is built before the first step."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks.bench_startup import measure_startup
from pipelines.beton import BetonWriter
from pipelines.convert import convert
from tests.helpers.processes import ROOT, environment

HELP_LIMIT_S, FILLED_LIMIT_S, EMPTY_LIMIT_S = 1.0, 5.0, 15.0
BATCH_SIZE = 16
# gcc is not among them: DeepSpeed asks it at import whether libaio can be linked, which builds nothing.
COMPILERS = {"ninja", "c++", "g++", "cc1plus", "nvcc"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A .beton of JPEGs."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(BATCH_SIZE):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
    done = convert("folder", str(folder / "images"), folder / "photographs.beton")
    assert done.num_passed == BATCH_SIZE  # as JPEGs, not as pixels
    return done.out


@pytest.fixture(scope="module")
def small_images(tmp_path_factory) -> Path:
    """A .beton of raw images of 32 px."""
    path = tmp_path_factory.mktemp("small") / "small.beton"
    rng = np.random.default_rng(0)
    with BetonWriter(path, BATCH_SIZE) as writer:
        for _ in range(BATCH_SIZE):
            writer.write_raw(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), label=0)
    return path


@pytest.fixture(params=[pytest.param("photographs at 224 px", marks=pytest.mark.slow), "raw at 32 px"])
def first_batch(request, photographs, small_images):
    """Measure one process's way to its first batch, given numba's cache folder (None: the usual one)."""
    beton, recipe = (photographs, "byol") if request.param.startswith("photographs") else (small_images, "simclr")

    def measure(cache_folder: Path | None) -> dict:
        return measure_startup(beton, recipe, global_batch_size=BATCH_SIZE, cache_folder=cache_folder)

    return measure


def test_help_takes_less_than_a_second(command):
    command("fastssl", "--help")  # the files come into the page cache
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = command("fastssl", "--help")
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < HELP_LIMIT_S, seconds


def test_the_command_line_imports_nothing_heavy():
    code = "import sys, fastssl.cli; print({'torch', 'numba', 'ffcv', 'deepspeed', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_trainer_imports_neither_the_compiler_nor_a_tracker():
    """Seconds of a start. torch's compiler comes with the first optimizer; DeepSpeed has MLflow for its autotuner."""
    code = """
import sys, fastssl.trainer
from fastssl.machine.private_api import import_deepspeed
import_deepspeed()
print({"torch._dynamo", "mlflow"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_with_compiled_code_in_the_cache_the_first_batch_comes_soon(first_batch):
    first_batch(None)  # compiles what other tests have not compiled yet
    again = min((first_batch(None) for _ in range(2)), key=lambda found: found["start_s"])
    assert again["compiled"] == {}
    assert again["start_s"] < FILLED_LIMIT_S, again


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing runs beside the decoder's compilation")
def test_with_an_empty_cache_the_first_batch_comes_in_time(first_batch, tmp_path):
    """Pixel op and decoder are compiled side by side, by two processes."""
    found = first_batch(tmp_path)
    assert any("decode_samples" in name for name in found["compiled"])
    assert not any("_augment_range" in name for name in found["compiled"])
    assert found["start_s"] < EMPTY_LIMIT_S, found


def test_one_cpu_process_builds_no_extension(tiny_config, tmp_path):
    """DeepSpeed would build its shared-memory collective at the first start, for more than a minute."""
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    arguments = [sys.executable, "fastssl/train.py", "--cfg", str(tiny_config), "--set", "train.num_epochs=1"]
    variables = environment() | {"TORCH_EXTENSIONS_DIR": str(extensions)}
    log = tmp_path / "log.txt"
    seen: set[str] = set()
    with log.open("w") as file:
        process = psutil.Popen(arguments, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            seen |= names_of_children(process)
            time.sleep(0.02)
    assert process.wait() == 0, log.read_text()
    assert os.listdir(extensions) == []
    assert seen & COMPILERS == set()


def names_of_children(process: psutil.Process) -> set[str]:
    try:
        return {child.name() for child in process.children(recursive=True)}
    except psutil.NoSuchProcess:  # ended meanwhile
        return set()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", ["1", "2"])
def test_views_in_a_fresh_cache_are_those_of_a_cached_one(num_processes, digits, tmp_path):
    """Bit for bit, also where several processes of a node compile and none has a core to spare."""
    program = """
import hashlib, sys
import torch
from pipelines.beton import BetonReader
from pipelines.loader import DataConfig, build_loader
from pipelines.views import ViewsConfig
places = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": 1}
reader, cfg = BetonReader(sys.argv[1]), DataConfig(global_batch_size=64)
loader = build_loader(reader, cfg, ViewsConfig(recipe="digits", size_px=16), seed=0, **places)
batch = next(loader.epoch(0))
print(*[hashlib.sha256(view.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest() for view in batch.views])
loader.close()
"""
    variables = environment() | {"NUMBA_CACHE_DIR": str(tmp_path), "LOCAL_WORLD_SIZE": num_processes}
    command = [sys.executable, "-c", program, str(digits / "train.beton")]
    fresh = [
        subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(int(num_processes))
    ]
    found = {process.communicate(timeout=240)[0] for process in fresh}
    again = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True, timeout=240)
    assert found == {again.stdout}
    assert len(again.stdout.split()) == 2
