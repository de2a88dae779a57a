"""Checks of the GPU, its driver, and Triton on it."""

import shutil
import subprocess

from fastssl.commands.doctor.finding import Finding, Node

_TOLERANCE = 0.0  # a sum of two floats is rounded once on either device


def check_gpu(node: Node) -> Finding:
    """GPUs reported by the driver, and those that torch can use."""
    import torch

    from fastssl.machine.nvidia_gpu import why_no_gpu, why_too_old

    shown = _nvidia_smi()
    if node.num_gpus:
        for i in range(node.num_gpus):
            if reason := why_too_old(i):
                return Finding("fail", reason, "use another GPU, or --set run.device=cpu")
        names = [torch.cuda.get_device_name(i) for i in range(node.num_gpus)]
        return Finding(
            "ok", f"{len(names)} x {names[0]}; {shown or 'no nvidia-smi'}; torch's CUDA {torch.version.cuda}"
        )
    if shown is None:
        status = "fail" if node.wants_gpu else "skipped"
        advice = "run.device is cuda: install NVIDIA's driver; in a container, docker run --gpus all"
        return Finding(status, "nvidia-smi finds no GPU", advice if node.wants_gpu else "")
    reason, _, advice = (why_no_gpu() or "").partition(": ")
    return Finding("fail", f"{shown}, but {reason}", advice)


def check_triton(node: Node) -> Finding:
    """Compile a kernel, run it, and compare."""
    if not node.num_gpus:
        return node.without_gpu("Triton")
    import torch

    from fastssl.commands.doctor.triton_kernel import add

    x = torch.randn(1000, device="cuda")
    y = torch.randn(1000, device="cuda")
    error = (add(x, y) - (x + y)).abs().max().item()
    if error > _TOLERANCE:
        return Finding(
            "fail",
            f"a test kernel that adds is wrong by {error:g}",
            "install the Triton version that belongs to this torch",
        )
    import triton

    return Finding("ok", f"Triton {triton.__version__} compiles a test kernel, and its result is correct")


def _nvidia_smi() -> str | None:
    """Name, driver and memory of the first GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    name, driver, memory = (part.strip() for part in lines[0].split(","))
    return f"{name}, driver {driver}, {memory}"
