"""What the choices of a run depend on: the images and the machine."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from fastssl.evaluation.labels import num_labelled_classes
from fastssl.processes.launch import choose_device
from pipelines.beton import BetonReader
from pipelines.read_ahead import available_memory_bytes
from pipelines.shards.open_images import open_images
from pipelines.shards.sharded_images import ShardedImages

_MOST_SIZES = 256  # of a data set of many files, whose rows are not read
_BUSY_S = 1.0  # how long other programs are watched


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The images of a .beton file, or of a data set of many, and the machine to train on.

    Attributes:
        num_images: Number of images.
        short_side_px: Median of the images' shorter sides, in pixels; of many files, of some images.
        is_one_size: Whether all images have the same height and width.
        decoded_bytes: Size of all images as uint8 RGB.
        file_bytes: Size of the file.
        num_classes: Number of classes that occur as labels; 0: no labels.
        device: Where the training computes.
        memory_bytes: Free memory of the host.
        gpu_memory_bytes: Memory of one GPU; 0 without a GPU.
        num_cores: CPU cores of this process.
        num_free_cores: Those that other programs leave, at least one.
        num_processes: Processes of the training, one per GPU.
        has_dali: Whether NVIDIA DALI is installed.
        is_sharded: Whether the images are a data set of many files.
    """

    num_images: int
    short_side_px: int
    is_one_size: bool
    decoded_bytes: int
    file_bytes: int
    num_classes: int
    device: Literal["cpu", "cuda"]
    memory_bytes: int
    gpu_memory_bytes: int
    num_cores: int
    num_free_cores: int
    num_processes: int
    has_dali: bool
    is_sharded: bool = False


def read_facts(beton: str | Path, *, device: str = "auto", num_processes: int | None = None) -> Facts:
    """The facts about a file and this machine.

    Args:
        beton: What to train on, see `pipelines.shards.open_images.open_images`.
        device: "auto", "cpu" or "cuda", as `run.device`.
        num_processes: Processes of the training; None: one per GPU, or one on the CPU.

    Raises:
        ConfigError: "cuda" without a usable GPU.
        DataError: the file cannot be read.
    """
    reader = open_images(beton)
    sizes, is_one_size, num_bytes = _sizes_of(reader)
    place = choose_device(device)
    on_gpu = place.type == "cuda"
    num_cores = len(os.sched_getaffinity(0))
    return Facts(
        num_images=reader.num_samples,
        short_side_px=int(np.median(sizes.min(1))),
        is_one_size=is_one_size,
        decoded_bytes=round(sizes.prod(1, dtype=np.int64).mean() * 3 * reader.num_samples),
        file_bytes=num_bytes,
        num_classes=num_labelled_classes(reader),
        device="cuda" if on_gpu else "cpu",
        memory_bytes=available_memory_bytes(),
        gpu_memory_bytes=torch.cuda.get_device_properties(place).total_memory if on_gpu else 0,
        num_cores=num_cores,
        num_free_cores=max(1, round(num_cores - psutil.cpu_percent(_BUSY_S) / 100 * (os.cpu_count() or num_cores))),
        num_processes=num_processes or count_processes(device),
        has_dali=find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None,
        is_sharded=isinstance(reader, ShardedImages),
    )


def _sizes_of(images: BetonReader | ShardedImages) -> tuple[np.ndarray, bool, int]:
    """Heights and widths [n, 2] in pixels, of some images if there are many files; whether all have one size; bytes."""
    if not isinstance(images, ShardedImages):
        return images.sizes, bool((images.sizes == images.sizes[0]).all()), len(images.mmap)
    ids = np.linspace(0, images.num_samples - 1, min(images.num_samples, _MOST_SIZES)).astype(np.int64)
    rows, manifest = images.few_rows(ids), images.manifest
    return np.stack([rows["height"], rows["width"]], 1), manifest.one_size_px is not None, manifest.num_bytes


def count_processes(device: str) -> int:
    """Processes of a training on this machine: one per GPU, or one on the CPU; `device` as `run.device`."""
    return torch.cuda.device_count() if choose_device(device).type == "cuda" else 1
