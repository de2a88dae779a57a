import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks.loader_providers import PROVIDERS, Job
from pipelines.beton import BetonWriter
from tests.processes import ROOT, environment

# Starts a provider with a worker of its own, stops both as between two windows, and waits to be killed.
PARENT = """
import sys, time
import psutil
from benchmarks.loader_providers import Job, Worker

if __name__ == "__main__":
    worker = Worker(
        "torchvision_tensor", Job(beton=sys.argv[1], recipe="simclr", batch_size=8, num_threads=1, seed=0)
    )
    worker.wait_until_ready()
    stopped = [each.pid for each in psutil.Process().children(recursive=True) if each.status() == "stopped"]
    print(worker.reason, *stopped, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def small_images(tmp_path) -> Path:
    path = tmp_path / "small.beton"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    with BetonWriter(path, len(pixels)) as writer:
        for image in pixels:
            writer.write_raw(image, label=0)
    return path


def test_the_bare_decoder_decodes_batch_by_batch(tmp_path):
    path, file = tmp_path / "jpegs.beton", io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file, "JPEG")
    with BetonWriter(path, 8) as writer:
        for _ in range(8):
            writer.write_jpeg(file.getvalue(), height_px=40, width_px=30)
    stream = PROVIDERS["decode"].open(Job(beton=str(path), recipe="byol", batch_size=4, num_threads=2, seed=0))
    assert [next(stream.batches) for _ in range(3)] == [None] * 3
    stream.batches.close()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's parent death signal")
def test_stopped_providers_end_when_the_benchmark_is_killed(small_images, tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    run = subprocess.Popen(
        [sys.executable, str(program), str(small_images)],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert run.stdout is not None
    reason, *pids = run.stdout.readline().split()
    run.kill()
    run.communicate()
    assert reason == "None"
    assert len(pids) == 2  # the provider and its worker
    left, end_s = set(map(int, pids)), time.monotonic() + 10
    while left and time.monotonic() < end_s:
        left = {pid for pid in left if is_alive(pid)}
        time.sleep(0.05)
    for pid in left:
        psutil.Process(pid).kill()
    assert not left


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
