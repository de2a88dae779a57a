import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines.beton import BetonWriter
from tests.helpers.processes import ROOT, environment

# Starts a provider with a worker of its own, stops both as between two windows, and waits to be killed.
PARENT = """
import sys, time
import psutil
from benchmarks.loader_providers import PROVIDERS
from pipelines.bench.streams import Job
from pipelines.bench.windows import Worker
from pipelines.views import ViewsConfig

if __name__ == "__main__":
    job = Job(beton=sys.argv[1], views=ViewsConfig(recipe="simclr"), batch_size=8, num_threads=1, seed=0)
    worker = Worker(PROVIDERS["torchvision_tensor"].open, job)
    worker.wait_until_ready()
    stopped, end_s = [], time.monotonic() + 20
    while len(stopped) < 2 and time.monotonic() < end_s:  # a signal takes its time
        time.sleep(0.05)
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


@pytest.mark.parametrize(("name", "package"), [("dali_native", "nvidia.dali"), ("kornia", "kornia")])
def test_a_peer_of_a_further_package_makes_normalised_float_views_of_the_file(name, package, small_images):
    pytest.importorskip(package)
    program = (
        "import os, sys\n"
        "from benchmarks.loader_providers import PROVIDERS\n"
        "from pipelines.bench.streams import Job\n"
        "from pipelines.views import ViewsConfig\n"
        f"views = ViewsConfig(recipe='byol', size_px=32)\n"
        "job = Job(beton=sys.argv[1], views=views, batch_size=8, num_threads=1, seed=0)\n"
        f"batch = next(PROVIDERS[{name!r}].open(job).batches)\n"
        "found = list(batch[0].values()) if isinstance(batch[0], dict) else batch\n"
        "print(*[(tuple(v.shape), str(v.dtype), bool(-2.2 < v.min() < 0 < v.max() < 2.7)) for v in found], sep=';')\n"
        "sys.stdout.flush(); os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(small_images)],
        cwd=ROOT, env=environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split(";") == ["((8, 3, 32, 32), 'torch.float32', True)"] * 2


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
