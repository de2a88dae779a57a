"""The DALI engine: NVIDIA DALI decodes, crops and resizes, with nvJPEG on a GPU, or entirely on the CPU without one.

The .beton file and the crop boxes are the same as for the other engines: our reader passes the JPEG bytes to DALI, and
the draw provides the crops. DALI cannot continue after an image that it fails to decode, and nvJPEG's behaviour on a
damaged image is not documented. Therefore every JPEG is first checked once by the other engines' decoder, in threads
that run some batches ahead.
https://docs.nvidia.com/deeplearning/dali/user-guide/docs/
"""

# DALI defines its names at run time:
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# B local batch, V views, Vg of one size, S its side in pixels

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from pipelines.bad_samples import BadSamples, Substitutes
from pipelines.batch import RawBatch
from pipelines.engines import BatchPlan, Groups
from pipelines.engines.decode_crop import why_bad
from pipelines.engines.turbojpeg import OK, UNREADABLE, JpegDecoder, check_jpeg, load_library
from pipelines.errors import DataError
from pipelines.samples import JPG, RAW, ImageSet, Samples

try:
    from nvidia.dali import Pipeline, fn, pipeline_def, types
except ImportError as error:
    raise DataError("engine dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (requirements/gpu.txt)") from error

_NO_JPEG, _NO_PIXELS = np.empty(0, np.uint8), np.empty((0, 0, 3), np.uint8)
_BATCHES_CHECKED_AHEAD = 16
_SAMPLES_OF_A_CHECK = 32
_MAX_REMEMBERED = 1 << 26  # samples, one byte each

# Some samples of a batch, and a future with the bad ones among them: id -> reason.
_Check = tuple[Samples, Future[dict[int, str]]]


class DaliEngine:
    """DALI's decoder and resampler with our reader and draw."""

    def __init__(
        self,
        images: ImageSet,
        *,
        num_workers: int,
        prefetch_batches: int,
        device: torch.device,
        bad_samples: BadSamples,
    ) -> None:
        """Choose the devices; the pipeline is built later, for the requested batch size and views.

        Args:
            images: The data set, open.
            num_workers: DALI's CPU threads, >= 1.
            prefetch_batches: Batches made ahead of the consumer, >= 1.
            device: "cuda": decoding and resampling run on that GPU, and the views are tensors on it.
            bad_samples: Records samples that cannot be decoded.
        """
        self._path, self._num_workers, self._num_ahead, self._device = (
            images.path, num_workers, prefetch_batches, device,
        )  # fmt: skip
        self._feed = _Feed(images, num_workers, bad_samples)
        self._pipeline: Pipeline | None = None
        self._pipeline_is_for: tuple[int, Groups] | None = None
        self._num_iterations = 0
        # Copies out of DALI's memory use their own stream, so that waiting for a copy does not wait for the training.
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None  # recorded after the copies of the last batch

    def batches(
        self, plans: Iterator[BatchPlan], local_batch_size: int, groups: Groups
    ) -> Generator[RawBatch, None, None]:
        """See `Engine.batches`; on a GPU the views are tensors on it."""
        self._drain()
        self._num_iterations += 1
        this_iteration = self._num_iterations
        pipeline = self._build(local_batch_size, groups)
        self._feed.start(plans)
        try:
            while True:
                try:
                    outputs = self._run(pipeline)
                except StopIteration:
                    break
                except RuntimeError as error:
                    raise self._explain(error) from error
                plan = self._feed.under_way.popleft()
                samples, views = plan.samples, self._take(outputs)
                yield RawBatch(views=views, params=plan.params, labels=samples.labels, sample_ids=samples.ids)
                if this_iteration != self._num_iterations:
                    raise RuntimeError("this iteration was ended by another one, or by close()")
        finally:
            if this_iteration == self._num_iterations:
                self._drain()

    def close(self) -> None:
        """Release DALI's threads and memory; a second call does nothing."""
        self._num_iterations += 1
        self._forget_pipeline()
        self._feed.close()

    def _build(self, local_batch_size: int, groups: Groups) -> Pipeline:
        if self._pipeline is None or self._pipeline_is_for != (local_batch_size, groups):
            self._forget_pipeline()
            on_gpu = self._device.type == "cuda"
            self._feed.num_views = sum(len(members) for _, members in groups)
            self._pipeline = pipeline_def(enable_conditionals=True)(_define)(
                self._feed, groups, "mixed" if on_gpu else "cpu",
                batch_size=local_batch_size, num_threads=self._num_workers, prefetch_queue_depth=self._num_ahead,
                device_id=(self._device.index or 0) if on_gpu else None,
            )  # fmt: skip
            self._pipeline.build()
            self._pipeline_is_for = (local_batch_size, groups)
        return self._pipeline

    def _run(self, pipeline: Pipeline) -> Any:
        """Return the next, complete batch; DALI may overwrite the previous one, which has been copied."""
        self._wait_for_copies()
        return pipeline.run()

    def _take(self, outputs: Any) -> list[np.ndarray | torch.Tensor]:
        """Views as arrays in DALI's memory; on a GPU, as copies that torch's current stream waits for."""
        if self._copy_stream is None:
            return [np.asarray(output.as_tensor()) for output in outputs]
        from nvidia.dali.plugin.pytorch import feed_ndarray

        consumer, views = torch.cuda.current_stream(self._device), []
        with torch.cuda.stream(self._copy_stream):
            for output in outputs:
                tensor = output.as_tensor()
                out = torch.empty(tensor.shape(), dtype=torch.uint8, device=self._device)
                feed_ndarray(tensor, out, cuda_stream=self._copy_stream)  # returns before the copy is done
                out.record_stream(consumer)
                views.append(out)
            copied = self._copied = self._copy_stream.record_event()
        consumer.wait_event(copied)
        return views

    def _wait_for_copies(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _drain(self) -> None:
        """Finish batches that an earlier iteration left in progress and discard them."""
        self._feed.stop()
        if self._pipeline is not None:
            with suppress(StopIteration):
                while True:
                    self._run(self._pipeline)
            self._pipeline.reset()
        self._feed.under_way.clear()

    def _forget_pipeline(self) -> None:
        self._feed.stop()
        self._feed.under_way.clear()
        self._feed.error = None
        self._wait_for_copies()
        self._pipeline = self._pipeline_is_for = None

    def _explain(self, error: RuntimeError) -> Exception:
        """Convert DALI's error to the error of the other engines; its pipeline cannot continue after an error."""
        of_feed, under_way = self._feed.error, list(self._feed.under_way)
        self._forget_pipeline()
        if of_feed is not None:
            return of_feed
        if not under_way:
            return error
        for plan in under_way:
            samples = plan.samples
            for i, (height_px, width_px), boxes in zip(
                samples.ids.tolist(), samples.sizes.tolist(), plan.params["crop_box"], strict=True
            ):
                if (boxes < (0, 0, 1, 1)).any() or (boxes[:, :2] + boxes[:, 2:] > (height_px, width_px)).any():
                    where = f"{self._path}: image {i}"
                    return DataError(f"{where} was given a crop box outside its {height_px}x{width_px} pixels")
        jpegs = [
            (int(i), plan.samples.image_bytes(position))
            for plan in under_way
            for position, i in enumerate(plan.samples.ids)
            if plan.samples.modes[position] == JPG
        ]
        bad = self._first_undecodable(jpegs)
        if bad is None:
            return error
        return DataError(
            f"{self._path}: image {bad} cannot be decoded by DALI, though the other engines decode it: take "
            "data.engine=ffcv, or repair or remove the image and convert again"
        )

    def _first_undecodable(self, jpegs: list[tuple[int, np.ndarray]]) -> int | None:
        """Id of the first JPEG that DALI itself refuses: its parser is stricter about markers than that of the check.

        None where DALI does not decode any: then the reason is not the image.
        """
        content = [stored for _, stored in jpegs]
        position = self._first_failure(content)
        if position == 0 and (len(content) == 1 or self._first_failure(content[1:2]) is not None):
            return None
        return None if position is None else jpegs[position][0]

    def _first_failure(self, content: list[np.ndarray]) -> int | None:
        """Position of the first JPEG that a new pipeline fails to decode."""
        on_gpu = self._device.type == "cuda"
        jpegs = ([stored] for stored in content)
        pipeline = pipeline_def(lambda: _decode(fn.external_source(jpegs), "mixed" if on_gpu else "cpu"))(
            batch_size=1, num_threads=1, device_id=(self._device.index or 0) if on_gpu else None,
            exec_async=False, exec_pipelined=False,
        )  # fmt: skip
        pipeline.build()
        for position in range(len(content)):
            try:
                pipeline.run()
            except RuntimeError:
                return position
        return None


class _Feed:
    """DALI's external source: returns the next batch's bytes and boxes, in the thread that requests views from DALI.

    Attributes:
        modes: The modes that occur in the file, ascending.
        under_way: The batches in DALI's pipeline, in order.
        error: The exception raised while a batch was fed; DALI itself passes on only its text.
        num_views: V.
    """

    def __init__(self, images: ImageSet, num_threads: int, bad_samples: BadSamples) -> None:
        self.modes = images.stored_modes
        self.under_way: deque[BatchPlan] = deque()
        self.error: Exception | None = None
        self.num_views = 0
        self._images = images
        self._plans = self._no_plans()
        self._substitutes = Substitutes(bad_samples, images)
        # Whether each sample has been checked, once and for all; of a larger data set each is checked at each use.
        self._is_checked = np.zeros(images.num_samples, bool) if images.num_samples <= _MAX_REMEMBERED else None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-check")
        self._decoders: SimpleQueue[JpegDecoder] = SimpleQueue()
        for _ in range(num_threads):
            self._decoders.put(JpegDecoder())
        if JPG in self.modes:
            load_library()  # raises here, rather than in a thread, if it is missing

    def start(self, plans: Iterator[BatchPlan]) -> None:
        """Start feeding these batches."""
        self.stop()
        self._plans = self._checked(plans)

    def stop(self) -> None:
        """Stop feeding batches."""
        self._plans.close()
        self._plans = self._no_plans()

    def close(self) -> None:
        """Stop the threads and free their decompressors; a second call does nothing."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        while not self._decoders.empty():
            self._decoders.get().close()

    def _no_plans(self) -> Generator[BatchPlan, None, None]:
        yield from ()

    def _checked(self, plans: Iterator[BatchPlan]) -> Generator[BatchPlan, None, None]:
        """Check the samples of some plans ahead; yield the plans with good samples in the place of bad ones."""
        under_check: deque[tuple[BatchPlan, list[_Check]]] = deque()
        try:
            while True:
                for plan in islice(plans, 1 + _BATCHES_CHECKED_AHEAD - len(under_check)):
                    under_check.append((plan, self._begin_checks(plan.samples)))
                if not under_check:
                    return
                plan, checks = under_check.popleft()
                self._end_checks(checks)
                yield BatchPlan(*self._substitutes.put_in(plan.samples, plan.params))
        finally:  # also if the generator is closed early
            for _, checks in under_check:
                for _, check in checks:
                    check.cancel()

    def _begin_checks(self, samples: Samples) -> list[_Check]:
        """Start checking samples that have not been checked before, in the pool's threads."""
        needs_check = samples.modes == JPG  # the length of raw pixels has been checked
        if self._is_checked is not None:
            needs_check &= ~self._is_checked[samples.ids]
        new = samples[np.flatnonzero(needs_check)]
        parts = [new[first : first + _SAMPLES_OF_A_CHECK] for first in range(0, len(new), _SAMPLES_OF_A_CHECK)]
        return [(part, self._pool.submit(self._find_bad, part)) for part in parts]

    def _end_checks(self, checks: list[_Check]) -> None:
        """Wait for these checks; replacements of bad samples are checked as well."""
        while checks:
            reasons: dict[int, str] = {}
            for samples, check in checks:
                reasons |= check.result()
                if self._is_checked is not None:
                    self._is_checked[samples.ids] = True
            if not reasons:
                return
            checks = self._begin_checks(self._images.samples(np.array(self._substitutes.add(reasons), np.int64)))

    def _find_bad(self, samples: Samples) -> dict[int, str]:
        decoder, found = self._decoders.get(), {}
        try:
            for position, i in enumerate(samples.ids.tolist()):
                height_px, width_px = samples.sizes[position].tolist()
                decoder.reserve(-(-height_px // 8) * -(-width_px // 8) * 3)
                stored = samples.image_bytes(position)
                status = check_jpeg(decoder.handle, stored, height_px, width_px, decoder.pixels)
                if status != OK and not (status == UNREADABLE and decoder.is_harmless()):
                    found[i] = why_bad(samples, position, status, decoder)
        finally:
            self._decoders.put(decoder)
        return found

    def __call__(self) -> list[Any]:
        """One batch as expected by `_define`: the inputs for the file's modes, then start and shape of every view."""
        try:
            plan = next(self._plans)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise
        self.under_way.append(plan)
        samples, boxes = plan.samples, plan.params["crop_box"]
        is_raw, pixels, jpegs = (samples.modes == RAW), [], []
        for position, raw in enumerate(is_raw.tolist()):
            stored = samples.image_bytes(position)
            pixels.append(stored.reshape(*samples.sizes[position], 3) if raw else _NO_PIXELS)
            jpegs.append(_NO_JPEG if raw else stored)
        starts = [np.ascontiguousarray(boxes[:, view, :2]) for view in range(self.num_views)]
        shapes = [np.ascontiguousarray(boxes[:, view, 2:]) for view in range(self.num_views)]
        images = {(JPG,): [jpegs], (RAW,): [pixels], (JPG, RAW): [jpegs, pixels, is_raw]}[self.modes]
        return [*images, *starts, *shapes]


def _define(feed: _Feed, groups: Groups, device: str) -> tuple[Any, ...]:
    """DALI's graph: one output per size, uint8 [Vg, S, S, 3] per sample."""
    images = [(types.UINT8, 1, ""), (types.UINT8, 3, "HWC"), (types.BOOL, 0, "")]
    images = {(JPG,): images[:1], (RAW,): images[1:2], (JPG, RAW): images}[feed.modes]
    kinds = images + [(types.INT32, 1, "")] * (2 * feed.num_views)
    inputs = fn.external_source(
        source=feed,
        num_outputs=len(kinds),
        batch=True,
        dtype=[kind[0] for kind in kinds],
        ndim=[kind[1] for kind in kinds],
        layout=[kind[2] for kind in kinds],
    )
    boxes = inputs[len(images) :]
    if feed.modes == (RAW,):
        image = inputs[0].gpu() if device == "mixed" else inputs[0]
    elif feed.modes == (JPG,):
        image = _decode(inputs[0], device)
    elif inputs[2]:  # pyright: ignore (DALI's conditional: each sample takes its own way)
        image = inputs[1].gpu() if device == "mixed" else inputs[1]
    else:
        image = _decode(inputs[0], device)
    outputs = []
    for size_px, members in groups:
        views = []
        for view in members:
            start, shape = boxes[view], boxes[feed.num_views + view]
            box = fn.slice(image, start, shape, axes=[0, 1], out_of_bounds_policy="error")
            views.append(fn.resize(box, size=[size_px, size_px], interp_type=types.INTERP_LINEAR, antialias=True))
        outputs.append(fn.stack(*views))
    return tuple(outputs)


def _decode(jpegs: Any, device: str) -> Any:
    # libjpeg's own chroma upsampling, which the other engines and Pillow use.
    return fn.decoders.image(jpegs, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)
