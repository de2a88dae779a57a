"""Whether torch can use a GPU here, whether it is new enough, and its memory; reasons and advice."""

import ctypes
import gc
import re
import subprocess
import warnings
from pathlib import Path

import torch

MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores; the Triton kernels are written and tested for it
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
# What full memory is called where torch's allocator is not asked: by CUDA, cuBLAS and cuDNN, Triton, DALI.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "[CUDA]: out of memory", "cudaErrorMemoryAllocation",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation on a GPU has failed."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Give the memory of what is no longer used back to the GPU: torch keeps it, and only torch could use it."""
    gc.collect()  # a trainer and its engine refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def has_gpu() -> bool:
    """Whether torch finds a GPU; suppresses torch's multi-line warning about an old driver."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def why_no_gpu() -> str | None:
    """Why torch finds no GPU and how to fix it, in one line; None: it finds one."""
    if has_gpu():
        return None
    driver = driver_version()
    if driver is None:
        return "torch finds no GPU: install NVIDIA's driver; in a container, docker run --gpus all"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built for the CPU, under NVIDIA driver {driver}: install a CUDA build "
            "(FASTSSL_BUILD=gpu make install)"
        )
    supported = cuda_of_driver()
    if supported and supported[0] < int(torch.version.cuda.split(".")[0]):  # minor versions are compatible
        cuda = ".".join(map(str, supported))
        return (
            f"NVIDIA driver {driver} supports CUDA {cuda}, too old for torch {torch.__version__}, which is built for "
            f"CUDA {torch.version.cuda}: install a newer driver, or a torch build for CUDA {cuda}"
        )
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU under NVIDIA driver {driver}: "
        "see CUDA_VISIBLE_DEVICES and nvidia-smi; in a container, docker run --gpus all"
    )


def why_too_old(device: int) -> str | None:
    """Why a GPU is too old for this project, in one line; None: it is not too old."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    return (
        f"this GPU ({torch.cuda.get_device_name(device)}) is compute capability {'.'.join(map(str, capability))}; "
        f"fastssl needs {'.'.join(map(str, MIN_CAPABILITY))} (A100, RTX 30) or newer"
    )


def driver_version() -> str | None:
    """Version of NVIDIA's driver, such as "535.104.05"; None: no driver is installed."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())
    except OSError:
        found = None
    return found[0] if found else _driver_of_nvidia_smi()


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, (major, minor); None: there is no driver library."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    return version.value // 1000, version.value % 1000 // 10  # 12020 means 12.2


def _driver_of_nvidia_smi() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines and not done.returncode else None
