"""Checks of the cores, memory and limits of this container."""

import math
import os
import resource
from pathlib import Path

from fastssl.commands.doctor.finding import Finding, Node
from pipelines.loader import DataConfig
from pipelines.read_ahead import available_memory_bytes

_MIN_SHM_BYTES = 1 << 30  # Docker gives 64 MB; NCCL and DALI take tens of MB for each GPU
_MIN_OPEN_FILES = 4096  # three connections to every other process, plus the libraries' files
_MIN_MEMORY_BYTES = 2 << 30  # torch, DeepSpeed and numba alone take most of 1 GiB
_CGROUP = Path("/sys/fs/cgroup")


def check_cores(_: Node) -> Finding:
    """Cores that this process may use, and the container's CPU quota."""
    num_cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    if quota is not None and quota < num_cores:
        threads = max(1, math.floor(quota))
        return Finding(
            "warn",
            f"{num_cores} cores are visible, but this container may use {quota:g}",
            "more threads than that are throttled: keep run.num_threads and data.num_workers, each times the number "
            f"of processes, at or below {threads}",
        )
    return Finding("ok", f"{num_cores} cores" + ("" if quota is None else f", quota {quota:g}"))


def cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """CPU quota of a cgroup (v2 or v1), in cores; None: no limit."""
    if (cgroup / "cpu.max").is_file():
        quota, period = (cgroup / "cpu.max").read_text().split()
    elif (cgroup / "cpu/cpu.cfs_quota_us").is_file():
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def check_memory(node: Node) -> Finding:
    """Memory available without swapping, and whether the training file fits into it."""
    free_bytes = available_memory_bytes()
    detail = f"{free_bytes / 1e9:.1f} GB of memory are available within this container's limit"
    if free_bytes < _MIN_MEMORY_BYTES:
        return Finding(
            "warn", detail, "a process takes about 1 GB before its first image: free memory, or raise the limit"
        )
    cfg = node.cfg.data if node.cfg else None
    if cfg and isinstance(cfg.train, str) and Path(cfg.train).is_file() and _reads_at_random(cfg):
        num_bytes = Path(cfg.train).stat().st_size
        if num_bytes > free_bytes:
            detail += f"; {cfg.train} is {num_bytes / 1e9:.1f} GB"
            return Finding("warn", detail, "set data.order=quasi_random data.cache=none (docs/data.md)")
    return Finding("ok", detail)


def check_shared_memory(_: Node) -> Finding:
    """/dev/shm, through which NCCL and DALI exchange data."""
    found = os.statvfs("/dev/shm")
    num_bytes = found.f_frsize * found.f_blocks
    detail = f"/dev/shm has {num_bytes / 1e9:.2f} GB"
    if num_bytes < _MIN_SHM_BYTES:
        advice = "docker run --ipc=host or --shm-size=8g; in Kubernetes an emptyDir with medium: Memory at /dev/shm"
        return Finding("warn", detail, advice)
    return Finding("ok", detail)


def check_open_files(_: Node) -> Finding:
    """Limit on open files and connections of a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"a process may open {_limit(soft, 'files')} (hard limit: {_limit(hard, 'files')})"
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        return Finding("warn", detail, "ulimit -n 65536; docker run --ulimit nofile=65536")
    return Finding("ok", detail)


def check_locked_memory(node: Node) -> Finding:
    """Limit on locked memory, which InfiniBand needs for its buffers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    detail = f"a process may lock {_limit(soft, 'bytes')} of memory"
    if soft == resource.RLIM_INFINITY:
        return Finding("ok", detail)
    adapters = Path("/sys/class/infiniband")
    if adapters.is_dir() and any(adapters.iterdir()):
        return Finding(
            "warn", f"{detail}, and there is InfiniBand", "ulimit -l unlimited; docker run --ulimit memlock=-1"
        )
    return Finding("ok", f"{detail}; enough without InfiniBand, of which this machine has no device")


def _limit(value: int, unit: str = "") -> str:
    number = "any number of" if value == resource.RLIM_INFINITY else f"{value:,}"
    return f"{number} {unit}".strip()


def _reads_at_random(cfg: DataConfig) -> bool:
    return cfg.order in ("auto", "random") and cfg.cache != "none"
