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
from pipelines.engines import BatchPlan, Groups
from pipelines.engines.decode_crop import why_bad
from pipelines.engines.ffcv import FfcvEngine
from pipelines.engines.turbojpeg import OK, UNREADABLE, JpegDecoder, decode_jpeg
from pipelines.errors import DataError
from pipelines.read_ahead import available_memory_bytes
from pipelines.samples import RAW, ImageSet, Samples

_IMAGES_OF_A_TASK = 256


class ResidentEngine:
    """Crops views from decoded images in the memory of `device`."""

    def __init__(
        self,
        images: ImageSet,
        *,
        num_workers: int,
        prefetch_batches: int,
        device: torch.device,
        bad_samples: BadSamples,
    ) -> None:
        """Decode the whole data set.

        Args:
            images: The data set, open.
            num_workers: Threads, >= 1.
            prefetch_batches: Batches made ahead of the consumer, >= 1 (CPU).
            device: The device whose memory stores the images.
            bad_samples: Records samples that cannot be decoded.
        Raises:
            DataError: too many samples are bad, the images do not fit into memory, or, on a GPU, differ in size.
        """
        self._device = device
        num_bytes = int(images.sizes.prod(1, dtype=np.int64).sum()) * 3
        _check_memory(images.path, num_bytes, device)
        one_size = bool((images.sizes == images.sizes[0]).all())
        if device.type == "cuda" and not one_size:
            raise DataError(f"{images.path}: engine resident needs images of one size on a GPU; take ffcv or dali")
        decoded, bad = _decode_all(images, num_workers, bad_samples)
        self._substitutes = Substitutes(bad_samples, decoded)
        self._substitutes.add(bad)
        self._decoded, self._on_gpu, self._on_cpu = decoded, None, None
        if device.type == "cuda":
            self._on_gpu = torch.from_numpy(decoded.pixels.reshape(-1, *images.sizes[0].tolist(), 3)).to(device)
            decoded.pixels = np.empty(0, np.uint8)
        else:
            ahead = {"num_workers": num_workers, "prefetch_batches": prefetch_batches}
            self._on_cpu = FfcvEngine(decoded, **ahead, bad_samples=bad_samples)

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`; on a GPU the views are `StoredImages`."""
        with_substitutes = (BatchPlan(*self._substitutes.put_in(plan.samples, plan.params)) for plan in plans)
        if self._on_cpu is not None:
            decoded = (BatchPlan(self._decoded.samples(plan.samples.ids), plan.params) for plan in with_substitutes)
            yield from self._on_cpu.batches(decoded, local_batch_size, groups)
            return
        assert self._on_gpu is not None
        for plan in with_substitutes:
            ids = plan.samples.ids
            on_device = torch.from_numpy(ids).pin_memory().to(self._device, non_blocking=True)
            views = [StoredImages(self._on_gpu, on_device, size_px) for size_px, _ in groups]
            yield RawBatch(views=views, params=plan.params, labels=plan.samples.labels, sample_ids=ids)

    def close(self) -> None:
        """Stop the threads and release the images; a second call does nothing."""
        if self._on_cpu is not None:
            self._on_cpu.close()
        self._on_gpu = self._on_cpu = None
        self._decoded.pixels = np.empty(0, np.uint8)


@dataclass(kw_only=True)
class _Decoded:
    """Decoded images stored contiguously, described like a file of raw pixels (`samples.ImageSet`)."""

    path: Path | str
    identity: list[int]
    pixels: np.ndarray  # uint8
    first_bytes: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.sizes)

    @property
    def stored_modes(self) -> tuple[int, ...]:
        return (RAW,)

    def samples(self, ids: np.ndarray) -> Samples:
        sizes = self.sizes[ids]
        return Samples(
            ids=ids,
            addresses=self.first_bytes[ids] + np.uint64(self.pixels.ctypes.data),
            num_bytes=sizes.prod(1, dtype=np.int64) * 3,
            modes=np.full(len(ids), RAW, np.uint8),
            sizes=sizes,
            labels=self.labels[ids],
            owners=(self.pixels,),
        )

    def check_unchanged(self, ids: np.ndarray | None = None) -> None:
        """Memory is nobody else's."""


def _decode_all(images: ImageSet, num_threads: int, bad_samples: BadSamples) -> tuple[_Decoded, dict[int, str]]:
    """Decode all images; also returns the reason for each image that could not be read or decoded."""
    data_bytes = images.sizes.prod(1, dtype=np.uint64) * np.uint64(3)
    ends = np.cumsum(data_bytes, dtype=np.uint64)
    pixels = np.empty(int(ends[-1]), np.uint8)
    first_bytes = ends - data_bytes
    bad: dict[int, str] = {}

    def decode(first: int) -> None:
        samples = images.samples(np.arange(first, min(first + _IMAGES_OF_A_TASK, images.num_samples)))
        decoder = JpegDecoder()
        try:
            for position in range(len(samples)):
                i = first + position
                if samples.ids[position] != i:  # replaced already, as its bytes are not the stored ones
                    bad[i] = bad_samples.reasons[i]
                    continue
                target = pixels[int(first_bytes[i]) : int(ends[i])]
                if samples.modes[position] == RAW:
                    target[:] = samples.image_bytes(position)
                    continue
                height_px, width_px = samples.sizes[position].tolist()
                status = decode_jpeg(decoder.handle, samples.image_bytes(position), height_px, width_px, target)
                if status != OK and not (status == UNREADABLE and decoder.is_harmless()):
                    bad[i] = why_bad(samples, position, status, decoder)
        finally:
            decoder.close()

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(decode, range(0, images.num_samples, _IMAGES_OF_A_TASK)):
            pass
    decoded = _Decoded(
        path=images.path,
        identity=images.identity,
        pixels=pixels,
        first_bytes=first_bytes,
        sizes=images.sizes,
        labels=images.labels,
    )
    return decoded, bad


def _check_memory(path: Path | str, num_bytes: int, device: torch.device) -> None:
    places = [("memory", available_memory_bytes())]
    if device.type == "cuda":
        places.append(("memory of the GPU", torch.cuda.mem_get_info(device)[0]))
    for name, free_bytes in places:
        if num_bytes > free_bytes:
            raise DataError(
                f"{path}: engine resident needs {num_bytes / 1e9:.1f} GB of {name} for the decoded images, "
                f"{free_bytes / 1e9:.1f} GB are free; take another engine"
            )
