"""Decodes every image once, at the start, and keeps it in memory: for small data sets such as CIFAR.

On the CPU, views are cropped from memory as from a .beton file of raw pixels. On a GPU, the images are in its memory,
and the pixel op crops the views itself, so only a batch's sample ids and crop boxes are transferred.
"""

# N samples, B local batch

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kernels.augment import StoredImages
from pipelines.bad_samples import BadSamples, Substitutes
from pipelines.batch import RawBatch
from pipelines.beton import RAW, BetonReader
from pipelines.engines import BatchPlan, Groups
from pipelines.engines.decode_crop import why_bad
from pipelines.engines.ffcv import FfcvEngine
from pipelines.engines.turbojpeg import OK, UNREADABLE, JpegDecoder, decode_jpeg
from pipelines.errors import DataError
from pipelines.read_ahead import available_memory_bytes

_IMAGES_OF_A_TASK = 256


class ResidentEngine:
    """Crops views from decoded images in the memory of `device`."""

    def __init__(
        self,
        reader: BetonReader,
        *,
        num_workers: int,
        prefetch_batches: int,
        device: torch.device,
        bad_samples: BadSamples,
    ) -> None:
        """Decode the whole file.

        Args:
            reader: The open file.
            num_workers: Threads, >= 1.
            prefetch_batches: Batches made ahead of the consumer, >= 1 (CPU).
            device: The device whose memory stores the images.
            bad_samples: Records samples that cannot be decoded.
        Raises:
            DataError: too many samples are bad, the images do not fit into memory, or, on a GPU, differ in size.
        """
        self._reader, self._device = reader, device
        num_bytes = int(reader.sizes.prod(1, dtype=np.int64).sum()) * 3
        _check_memory(reader.path, num_bytes, device)
        one_size = bool((reader.sizes == reader.sizes[0]).all())
        if device.type == "cuda" and not one_size:
            raise DataError(f"{reader.path}: engine resident needs images of one size on a GPU; take ffcv or dali")
        decoded, bad = _decode_all(reader, num_workers)
        self._substitutes = Substitutes(bad_samples, reader.sizes)
        self._substitutes.add(bad)
        self._images = self._on_cpu = None
        if device.type == "cuda":
            self._images = torch.from_numpy(decoded.mmap.reshape(-1, *reader.sizes[0].tolist(), 3)).to(device)
        else:
            ahead = {"num_workers": num_workers, "prefetch_batches": prefetch_batches}
            self._on_cpu = FfcvEngine(decoded, **ahead, bad_samples=bad_samples)

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`; on a GPU the views are `StoredImages`."""
        with_substitutes = (BatchPlan(*self._substitutes.put_in(plan.sample_ids, plan.params)) for plan in plans)
        if self._on_cpu is not None:
            yield from self._on_cpu.batches(with_substitutes, local_batch_size, groups)
            return
        assert self._images is not None
        for plan in with_substitutes:
            ids = plan.sample_ids
            on_device = torch.from_numpy(ids).pin_memory().to(self._device, non_blocking=True)
            views = [StoredImages(self._images, on_device, size_px) for size_px, _ in groups]
            yield RawBatch(views=views, params=plan.params, labels=self._reader.labels[ids], sample_ids=ids)

    def close(self) -> None:
        """Stop the threads and release the images; a second call does nothing."""
        if self._on_cpu is not None:
            self._on_cpu.close()
        self._images = self._on_cpu = None


@dataclass(frozen=True)
class _Decoded:
    """Decoded images stored contiguously, described like a file of raw pixels (`decode_crop.SampleTable`)."""

    path: Path
    mmap: np.ndarray  # the pixels, uint8
    sizes: np.ndarray
    labels: np.ndarray
    modes: np.ndarray
    data_ptr: np.ndarray
    data_bytes: np.ndarray


def _decode_all(reader: BetonReader, num_threads: int) -> tuple[_Decoded, dict[int, str]]:
    """Decode all images; also returns the reason for each image that could not be decoded."""
    data_bytes = reader.sizes.prod(1, dtype=np.uint64) * np.uint64(3)
    ends = np.cumsum(data_bytes, dtype=np.uint64)
    pixels = np.empty(int(ends[-1]), np.uint8)
    first_bytes = ends - data_bytes
    bad: dict[int, str] = {}

    def decode(first: int) -> None:
        decoder = JpegDecoder()
        try:
            for i in range(first, min(first + _IMAGES_OF_A_TASK, reader.num_samples)):
                target = pixels[int(first_bytes[i]) : int(ends[i])]
                if reader.modes[i] == RAW:
                    target[:] = reader.image_bytes(i)
                    continue
                height_px, width_px = reader.sizes[i].tolist()
                status = decode_jpeg(decoder.handle, reader.image_bytes(i), height_px, width_px, target)
                if status != OK and not (status == UNREADABLE and decoder.is_harmless()):
                    bad[i] = why_bad(reader, i, status, decoder)
        finally:
            decoder.close()

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(decode, range(0, reader.num_samples, _IMAGES_OF_A_TASK)):
            pass
    modes = np.full(reader.num_samples, RAW, reader.modes.dtype)
    return _Decoded(reader.path, pixels, reader.sizes, reader.labels, modes, first_bytes, data_bytes), bad


def _check_memory(path: Path, num_bytes: int, device: torch.device) -> None:
    places = [("memory", available_memory_bytes())]
    if device.type == "cuda":
        places.append(("memory of the GPU", torch.cuda.mem_get_info(device)[0]))
    for name, free_bytes in places:
        if num_bytes > free_bytes:
            raise DataError(
                f"{path}: engine resident needs {num_bytes / 1e9:.1f} GB of {name} for the decoded images, "
                f"{free_bytes / 1e9:.1f} GB are free; take another engine"
            )
