"""Starting the processes of a run: device, threads and the process group, under any launcher or none."""

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist

from fastssl import collectives
from fastssl.config import RunConfig
from fastssl.errors import ConfigError, Preempted
from fastssl.machine.nvidia_gpu import driver_version, why_no_gpu, why_too_old
from fastssl.machine.private_api import check_libraries, import_deepspeed, use_gloo_for_shared_memory
from fastssl.processes.rendezvous import ALONE, join
from fastssl.processes.watchdog import Watchdog
from pipelines.loader import cores_per_process


@dataclass(frozen=True)
class Process:
    """This process of a run.

    Attributes:
        device: Where it computes.
        watchdog: Ends it where another process of the run is lost.
    """

    device: torch.device
    watchdog: Watchdog


@contextmanager
def started_process(cfg: RunConfig) -> Iterator[Process]:
    """Start this process of a run and watch the others; the caller gets back its environment and torch's settings.

    Raises:
        ConfigError: see `choose_device`.
        PeerLostError: the other processes do not come, or one of them is lost.
    """
    environment = {name: os.environ.get(name) for name in ALONE}
    benchmark = torch.backends.cudnn.benchmark
    try:
        with Watchdog() as watchdog:
            device = start_process(cfg)
            watchdog.watch(cfg)
            with _current_stream(device):
                yield Process(device, watchdog)
        leave_group_at_exit()
    except Exception as error:
        # Where one rank alone has failed, leaving would wait for the others.
        if isinstance(error, Preempted) or collectives.world_size() == 1:
            leave_group_at_exit()
        raise
    finally:
        torch.backends.cudnn.benchmark = benchmark  # an evaluation's batches differ in size
        # Programs that are started later are not ranks of this run.
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)


def _current_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Context that ends with the stream that is current now: a captured step sets another one for the thread."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()


def start_process(cfg: RunConfig) -> torch.device:
    """Choose this process's device, set its threads and join the process group.

    Works under `deepspeed` (which passes --local_rank and sets RANK), under torchrun, and alone.

    Returns:
        The device of this process.
    Raises:
        ConfigError: see `choose_device`.
        PeerLostError: the other processes do not come.
    """
    device = choose_device(cfg.device)
    torch.set_num_threads(num_threads_of(cfg))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    _init_deepspeed(device, cfg)
    return device


def leave_group_at_exit() -> None:
    """Have NCCL's process group destroyed when this process ends: NCCL warns otherwise.

    Not earlier: another training in this process uses the same group, which DeepSpeed keeps references to.
    """
    if torch_dist.is_initialized() and torch_dist.get_backend() == "nccl":
        atexit.unregister(torch_dist.destroy_process_group)
        atexit.register(torch_dist.destroy_process_group)


def num_threads_of(cfg: RunConfig) -> int:
    """CPU threads that this process may use."""
    return cfg.num_threads or cores_per_process()


def choose_device(wanted: str) -> torch.device:
    """The device that `run.device` names.

    "auto" without a GPU is the CPU; where NVIDIA's driver is installed, with a line that says why no GPU is used.

    Raises:
        ConfigError: a GPU is demanded and none is found, the GPU is too old, or there are more processes than GPUs.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    reason = why_no_gpu()
    if reason and wanted == "cuda":
        raise ConfigError(f"run.device is cuda, but {reason}; or use the CPU with --set run.device=cpu")
    if reason:
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if local_rank == 0 and not is_hidden and driver_version():
            print(f"fastssl: warning: running on the CPU: {reason}", file=sys.stderr, flush=True)
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no GPU, because torch finds only {num_gpus}: start "
            f"{num_gpus} processes here, or use --set run.device=cpu"
        )
    if reason := why_too_old(local_rank):
        raise ConfigError(f"{reason}: use --set run.device=cpu")
    return torch.device("cuda", local_rank)


def _init_deepspeed(device: torch.device, cfg: RunConfig) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    deepspeed = import_deepspeed()
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    check_libraries(device)
    if device.type == "cpu":
        use_gloo_for_shared_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if torch_dist.is_initialized():
        _check_group(backend)
    else:
        join(backend, cfg)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _check_group(backend: str) -> None:
    """Refuse a process group of another backend, which an earlier training of this process, or its program, has made.

    DeepSpeed takes rank and world size from the environment, which may have been reset since.
    """
    if torch_dist.get_backend() != backend:
        raise ConfigError(
            f"run.device: this process already has a process group with backend {torch_dist.get_backend()}, but "
            f"{backend} is needed: train on the same device as before, or in a new process"
        )
    if torch_dist.get_world_size() == 1:
        for name, value in ALONE.items():
            os.environ.setdefault(name, value)
