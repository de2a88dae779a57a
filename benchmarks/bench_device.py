"""Describe and measure the machine: GPU, driver, versions, one all-reduce, matrix products and copies.

    python benchmarks/bench_device.py --out benchmarks/results/device.csv

The matrix products and copies are upper limits for the figures of the other benchmarks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from fastssl.tracking.result_rows import append_rows, environment_columns

PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "numba", "deepspeed", "pydantic", "ffcv")
PACKAGES += ("nvidia-dali-cuda130", "nvidia-nccl-cu13", "pytest", "pytest-xdist")
Figure = tuple[str, float, str]  # name, value, unit


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it work")
    parser.add_argument("--out", type=Path, metavar="X.csv", help="file to append the rows to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    environment = environment_columns(PACKAGES)
    for name, value in (environment | driver_columns(args.device)).items():
        print(f"{name:<24}{value}", flush=True)
    for what, value, unit in measure(torch.device(args.device), 256 if args.smoke else None):
        row = {"measured": what, "value": float(f"{value:.5g}"), "unit": unit, "device": args.device}
        print(f"{what:<44}{row['value']:>12} {unit}", flush=True)
        if args.out:
            append_rows(args.out, [row | environment])


def driver_columns(device: str) -> dict[str, str]:
    """The output of nvidia-smi for each GPU; empty without a GPU."""
    if device == "cpu":
        return {}
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = f"nvidia-smi: {error}"
    capability = torch.cuda.get_device_capability()
    return {
        "nvidia_smi": said,
        "cuda_of_torch": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "compute_capability": ".".join(map(str, capability)),
        "multiprocessors": str(torch.cuda.get_device_properties(0).multi_processor_count),
        "memory_gib": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}",
    }


def measure(device: torch.device, small: int | None) -> Iterator[Figure]:
    """Yield each figure as soon as it is known; `small` is the side length of all matrices."""
    yield from all_reduce(device, small)
    n = small or (8192 if device.type == "cuda" else 1024)
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if device.type == "cuda" else (torch.float32,):
        yield product(device, n, dtype)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        what, value, unit = product(device, n, torch.float32)
        yield f"{what}, TF32", value, unit
    num_bytes = n * n * 4 if small or device.type == "cpu" else 2**30
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = least_s(lambda: target.copy_(source), device)
    yield f"copy on the device, {num_bytes >> 10} KiB", 2 * num_bytes / seconds / 1e9, "GB/s read and written"
    if device.type == "cuda":
        pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        seconds = least_s(lambda: target.copy_(pinned, non_blocking=True), device)
        yield "copy from pinned memory to the device", num_bytes / seconds / 1e9, "GB/s"
        yield "host time of a small kernel", launch_us(device), "us"


def all_reduce(device: torch.device, small: int | None) -> Iterator[Figure]:
    """Check in one process that the communication library starts and returns the right sum.

    Raises:
        RuntimeError: If the sum is wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        x = torch.full(((small or 4096) ** 2,), 3.0, device=device)
        dist.all_reduce(x)
        if not bool((x == 3).all()):
            raise RuntimeError(f"{backend}: an all-reduce of one process changed its values")
        yield f"{backend} start and first all-reduce", time.perf_counter() - started, "s"
        yield f"{backend} all-reduce, {x.nbytes >> 10} KiB", 1e3 * least_s(lambda: dist.all_reduce(x), device), "ms"
        dist.destroy_process_group()


def product(device: torch.device, n: int, dtype: torch.dtype) -> Figure:
    """Time a square matrix product, checked against fp64 on one row.

    Raises:
        RuntimeError: If the product is wrong.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = least_s(lambda: torch.mm(a, b, out=out), device)
    exact = a[0].double() @ b.double()
    error = float((out[0].double() - exact).norm() / exact.norm())
    name = str(dtype).removeprefix("torch.")
    if not error < 1e-2:
        raise RuntimeError(f"a {name} product is off by {error:.2g}")
    return f"{name} product, {n} x {n}", 2 * n**3 / seconds / 1e12, "TFLOP/s"


def launch_us(device: torch.device) -> float:
    """The host's time to launch a kernel with almost no work."""
    x = torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(1000):
        x.add_(1)
    host_s = time.perf_counter() - started
    torch.cuda.synchronize(device)
    return host_s * 1e3


def least_s(call: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """The minimum time of `repetitions` calls, after one warm-up call."""
    times = []
    for _ in range(repetitions + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    main()
