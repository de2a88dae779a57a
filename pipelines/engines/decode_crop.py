"""Decodes each sample of a batch once and crops its views, in several threads: the work of the ffcv engine.

A thread pool is used instead of numba's `prange`: ranges of about equal bytes balance images of uneven size, and
numba's workqueue layer does not support concurrent use by two threads (the pixel op runs at the same time).
"""

# B local batch, V views, Vg views of one output size S

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils
from numba.extending import intrinsic

from pipelines import resample, simd
from pipelines.bad_samples import BadSamples, move_boxes
from pipelines.engines import jpeg_region, turbojpeg
from pipelines.engines.jpeg_region import decode_jpeg_region, why_no_region_decoder
from pipelines.engines.turbojpeg import OK, UNREADABLE, WRONG_SIZE, JpegDecoder, decode_jpeg, load_library
from pipelines.errors import DataError
from pipelines.resample import Weights, is_small, resized_crop, small_crop, small_weights
from pipelines.samples import JPG, ImageSet, Samples

# The kernel's arguments for one batch after its samples: boxes, place, outputs, `small_weights` of their sizes.
_Work = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...], tuple[Weights, ...]]

# Smaller JPEGs are decoded in full: decoding only what the views show would save nothing.
REGION_MIN_BYTES = 20_000

_BAD_BOX = 3
_NO_HANDLE = np.zeros(1, np.int64)  # of a decompressor that is not used
# A task contains at least this many encoded bytes (about 5 ms of decoding), so that starting it costs little in
# comparison. More than 16 tasks per thread would not balance better.
_MIN_TASK_BYTES = 256 * 1024
_MAX_TASKS_PER_THREAD = 16


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """The pointer to a byte at an address of this process's memory."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.CPointer(types.uint8)(address), generate


def _build_kernel(source_hash: str, has_jpegs: bool, has_regions: bool) -> Callable[..., Any]:
    """Build the jitted kernel, cached on disk by the date of this file and the arguments.

    numba compiles the called functions into the kernel, but only checks the kernel's own file for changes. The closure
    makes `source_hash`, the hash of the called functions' source, part of the cache key; otherwise the old code would
    stay in use after a change of the resampler. If `has_jpegs` or `has_regions` is False, numba omits the decoder of
    whole JPEGs or of their parts, whose library LLVM would otherwise need.
    """

    @njit(nogil=True, cache=True)
    def decode_samples(
        first: int,
        stop: int,
        forgiven: int,
        handle: np.ndarray,
        message: np.ndarray,
        pixels: np.ndarray,
        addresses: np.ndarray,
        num_bytes: np.ndarray,
        modes: np.ndarray,
        sizes: np.ndarray,
        boxes: np.ndarray,
        place: np.ndarray,
        outputs: tuple[np.ndarray, ...],
        weights: tuple[Weights, ...],
    ) -> tuple[int, int]:
        """Decode samples first..stop-1 of the batch and crop their views.

        Returns:
            (stop, OK), or the position of the first sample that failed and its status. The sample at position
            `forgiven` may be UNREADABLE: its warning was checked and is harmless.
        """
        assert source_hash  # makes it part of the closure
        for position in range(first, stop):
            data = carray(_pointer(addresses[position]), (num_bytes[position],), np.uint8)  # pyright: ignore (an intrinsic)
            height_px, width_px = np.int64(sizes[position, 0]), np.int64(sizes[position, 1])
            # What the views show: rows top..bottom-1, columns left..right-1.
            top_px, left_px, bottom_px, right_px = height_px, width_px, np.int64(0), np.int64(0)
            for view in range(boxes.shape[1]):
                view_top_px, view_left_px, crop_height_px, crop_width_px = boxes[position, view]
                if min(view_top_px, view_left_px) < 0 or min(crop_height_px, crop_width_px) < 1:
                    return position, _BAD_BOX
                top_px, left_px = min(top_px, view_top_px), min(left_px, view_left_px)
                bottom_px = max(bottom_px, view_top_px + crop_height_px)
                right_px = max(right_px, view_left_px + crop_width_px)
            if bottom_px > height_px or right_px > width_px:
                return position, _BAD_BOX
            if has_jpegs and modes[position] == JPG:
                if has_regions and num_bytes[position] >= REGION_MIN_BYTES:
                    status = decode_jpeg_region(
                        data, height_px, width_px, top_px, left_px, bottom_px, right_px, pixels, message
                    )
                else:
                    message[0] = 0
                    status = decode_jpeg(handle, data, height_px, width_px, pixels)  # pyright: ignore (numpy's integers)
                if status == WRONG_SIZE or (status != OK and position != forgiven):
                    return position, status
                image = pixels[: height_px * width_px * 3].reshape((height_px, width_px, 3))
            else:
                image = data.reshape((height_px, width_px, 3))
            for view in range(boxes.shape[1]):
                top_px, left_px, crop_height_px, crop_width_px = boxes[position, view]
                group = place[view, 0]
                out = outputs[group][position, place[view, 1]]
                if is_small(crop_height_px, crop_width_px, out.shape[0]):
                    starts, taps = weights[group]
                    rows_from = starts[crop_height_px], taps[crop_height_px]
                    columns_from = starts[crop_width_px], taps[crop_width_px]
                    small_crop(image, top_px, left_px, crop_height_px, crop_width_px, rows_from, columns_from, out)
                else:
                    resized_crop(image, top_px, left_px, crop_height_px, crop_width_px, out)
        return stop, OK

    return decode_samples


@cache
def _kernel(has_jpegs: bool, has_regions: bool) -> Callable[..., Any]:
    """The kernel for files with JPEGs, decoded in part or in full, or for files with only raw pixels."""
    sources = [Path(str(module.__file__)) for module in (resample, simd, turbojpeg, jpeg_region)]
    sources.append(jpeg_region.SOURCE)
    source_hash = "".join(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)
    return _build_kernel(source_hash, has_jpegs, has_regions)


class Decoding:
    """A batch that is being decoded."""

    def __init__(self, tasks: list[Future[None]]) -> None:
        self._tasks = tasks

    def wait(self) -> None:
        """Wait until the batch is complete.

        Raises:
            DataError: too many samples are bad, or a box lies outside its image; other tasks may still be running.
        """
        for task in self._tasks:
            task.result()

    def cancel(self) -> None:
        """Cancel tasks that have not started, and wait until nothing is written any more."""
        wait([task for task in self._tasks if not task.cancel()])


class BatchDecoder:
    """A pool of threads, each with a decompressor and a buffer for one image (as large as the largest image so far)."""

    def __init__(self, images: ImageSet, num_threads: int, bad_samples: BadSamples) -> None:
        self._images = images
        self._bad_samples = bad_samples
        self._has_jpegs = JPG in images.stored_modes  # raw images need no decompressor and no buffer
        self._decode_samples = _kernel(self._has_jpegs, self._has_jpegs and why_no_region_decoder() is None)
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-decode")
        self._decoders: SimpleQueue[JpegDecoder] = SimpleQueue()
        for _ in range(num_threads):
            self._decoders.put(JpegDecoder())
        if self._has_jpegs:
            load_library()  # raises here, rather than in a thread, if it is missing

    def start(
        self,
        samples: Samples,
        boxes: np.ndarray,
        groups: list[tuple[int, list[int]]],
        outputs: tuple[np.ndarray, ...],
    ) -> "Decoding":
        """Start filling `outputs` with the views of a batch.

        A batch may be started while others are in progress. A thread that has finished its part of one batch then
        continues with the next one instead of sleeping; waking a thread takes up to 0.1 ms.

        Args:
            samples: B samples; bad ones are overwritten with their replacements.
            boxes: Crop boxes (top, left, height, width), int32 [B, V, 4]; rescaled for replacements.
            groups: `views.size_groups`.
            outputs: uint8 [B, Vg, S, S, 3] for each group. All these may be written until the result's `wait` or
                `cancel` returns.
        """
        place = np.empty((boxes.shape[1], 2), np.int64)  # for each view: its group and its index in the group
        for group, (_, views) in enumerate(groups):
            for slot, view in enumerate(views):
                place[view] = group, slot
        bounds = self._split(samples)
        weights = tuple(small_weights(size_px) for size_px, _ in groups)
        work = (boxes, place, outputs, weights)
        return Decoding([self._pool.submit(self._decode_range, *pair, samples, work) for pair in pairwise(bounds)])

    def close(self) -> None:
        """Stop the threads and free their decompressors; a second call does nothing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        while not self._decoders.empty():
            self._decoders.get().close()

    def _split(self, samples: Samples) -> list[int]:
        """Bounds of contiguous ranges of samples with about equal encoded size."""
        ends = np.cumsum(samples.num_bytes)
        most = self._num_threads * _MAX_TASKS_PER_THREAD
        num_tasks = min(max(int(ends[-1]) // _MIN_TASK_BYTES, self._num_threads), most)
        inner = np.searchsorted(ends, ends[-1] * np.arange(1, num_tasks) / num_tasks)
        return sorted({0, *inner.tolist(), len(ends)})

    def _decode_range(self, first: int, stop: int, samples: Samples, work: _Work) -> None:
        boxes, path = work[0], self._images.path
        substitutes: list[Samples] = []  # their memory must stay valid
        decoder = self._decoders.get()
        try:
            if self._has_jpegs:
                decoder.reserve(3 * int(samples.sizes[first:stop].prod(1, dtype=np.int64).max()))
            forgiven, handle = -1, decoder.handle if self._has_jpegs else _NO_HANDLE
            asked: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by position: size of the original sample, and boxes
            while first < stop:
                first, status = self._decode_samples(
                    first, stop, forgiven, handle, decoder.message, decoder.pixels,
                    samples.addresses, samples.num_bytes, samples.modes, samples.sizes, *work,
                )  # fmt: skip
                if status == UNREADABLE and decoder.is_harmless():
                    forgiven = first
                elif status == _BAD_BOX:
                    sides_px = "x".join(map(str, samples.sizes[first]))
                    where = f"{path}: image {samples.ids[first]}"
                    raise DataError(f"{where} was given a crop box outside its {sides_px} pixels")
                elif status != OK:
                    asked_size, asked_boxes = asked.setdefault(
                        first, (samples.sizes[first].copy(), boxes[first].copy())
                    )
                    reason = why_bad(samples, first, status, decoder)
                    good = self._bad_samples.replace(int(samples.ids[first]), reason)
                    substitutes.append(self._images.samples(np.array([good])))
                    samples.put(first, substitutes[-1])
                    decoder.reserve(3 * int(samples.sizes[first].prod(dtype=np.int64)))
                    boxes[first] = move_boxes(asked_boxes, asked_size, samples.sizes[first])
        finally:
            self._decoders.put(decoder)


def why_bad(samples: Samples, position: int, status: int, decoder: JpegDecoder) -> str:
    """Describe why a sample is bad, from a status that is not OK."""
    if status == WRONG_SIZE:
        return f"is not {'x'.join(map(str, samples.sizes[position]))} as recorded"
    return f"cannot be decoded ({decoder.last_message()})"
