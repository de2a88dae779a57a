"""Images -> a .beton file."""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from pipelines.beton import BetonWriter
from pipelines.convert.images import (
    MAX_JPEG_SIDE_PX,
    CorruptImageError,
    StoredImage,
    quiet_pillow,
    store_file,
    store_pixels,
)
from pipelines.convert.sources import Source, SourceKind, build_source
from pipelines.errors import DataError

__all__ = ["ConvertReport", "SourceKind", "convert"]

NUM_AHEAD_PER_THREAD = 8  # finished images that wait for the writer; bounds the memory

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        out: The .beton file.
        num_images: Images in it: the sum of the next three.
        num_passed: JPEG files whose bytes were kept unchanged.
        num_encoded: Images encoded as JPEG anew.
        num_raw: Images stored as pixels.
        num_skipped: Corrupt images left out.
        num_ignored: Files of the folder that are not named like images.
        errors_path: List of the skipped, one `path<TAB>reason` a line; None where there are none.
        wall_s: Duration in seconds.
    """

    out: Path
    num_images: int
    num_passed: int
    num_encoded: int
    num_raw: int
    num_skipped: int
    num_ignored: int
    errors_path: Path | None
    wall_s: float


def convert(
    source_kind: SourceKind,
    src: str | None,
    out: str | Path,
    *,
    max_px: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    quality: int = 95,
    split: str | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write a .beton file and its sidecar; every image is decoded once on the way, so that corrupt ones show.

    Args:
        source_kind: "folder" (class sub-folders, or flat and unlabelled), "npz" (arrays x, y) or "digits".
        src: The folder or file; None for "digits".
        out: The .beton file; its folder is created.
        max_px: Downscale images whose longer side is larger.
        on_error: At a corrupt image, stop, or leave it out and list it in `<out>.errors.txt`.
        quality: JPEG quality of re-encoded images, 1..100.
        split: Which part of the source ("digits": train or test; "npz": suffix of the arrays' names); None: all.
        overwrite: Replace an existing file.
    Raises:
        ValueError: an option outside its range.
        DataError: bad source, a corrupt image with on_error="fail", nothing but corrupt images, or `out` exists.
    """
    _check_options(max_px, on_error, quality)
    start_s = time.monotonic()
    source = build_source(source_kind, src, split)
    out = Path(out)
    options = {"source_kind": source_kind, "max_px": max_px, "on_error": on_error, "quality": quality, "split": split}
    errors: list[tuple[str, str]] = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = BetonWriter(
            out,
            len(source.labels),
            class_names=source.class_names,
            source=source.name,
            options=options,
            overwrite=overwrite,
        )
        with writer:
            how = _write_all(writer, source, max_px, quality, None if on_error == "fail" else errors)
            errors_path = _write_errors(out, errors)
            if not writer.num_samples:
                raise DataError(f"{source.name}: all {len(errors)} images are corrupt; see {errors_path}")
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    if errors:
        print(f"{len(errors)} of {len(source.labels)} images are corrupt and were left out; see {errors_path}")
    return ConvertReport(
        out=out,
        num_images=how.total(),
        num_passed=how["passed"],
        num_encoded=how["encoded"],
        num_raw=how["raw"],
        num_skipped=len(errors),
        num_ignored=source.num_ignored,
        errors_path=errors_path,
        wall_s=time.monotonic() - start_s,
    )


def _check_options(max_px: int | None, on_error: str, quality: int) -> None:
    if max_px is not None and not 1 <= max_px <= MAX_JPEG_SIDE_PX:
        raise ValueError(f"max_px must be 1..{MAX_JPEG_SIDE_PX}, not {max_px}")
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error must be fail or skip, not {on_error!r}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1..100, not {quality}")


def _write_all(
    writer: BetonWriter, source: Source, max_px: int | None, quality: int, errors: list[tuple[str, str]] | None
) -> Counter[str]:
    """Write every good image; corrupt ones go to `errors`, or raise DataError where that is None."""
    from tqdm import tqdm

    def store(image: str | np.ndarray) -> StoredImage | CorruptImageError:
        try:
            if isinstance(image, str):
                return store_file(image, max_px=max_px, quality=quality)
            return store_pixels(image, max_px=max_px)
        except CorruptImageError as error:
            return error

    how: Counter[str] = Counter()
    stored = bounded_map(store, source.images, num_threads=len(os.sched_getaffinity(0)))
    progress = tqdm(stored, total=len(source.labels), unit=" images", disable=None)
    with quiet_pillow(), closing(stored), progress:
        for image, label, result in zip(source.images, source.labels, progress, strict=True):
            if isinstance(result, StoredImage):
                _write(writer, result, int(label))
                how[result.how] += 1
            elif errors is None:
                raise DataError(f"{image}: {result}; repair or remove it, or pass --on-error skip")
            else:
                errors.append((str(image), str(result)))
    return how


def _write(writer: BetonWriter, image: StoredImage, label: int) -> None:
    if isinstance(image.data, bytes):
        writer.write_jpeg(image.data, height_px=image.height_px, width_px=image.width_px, label=label)
    else:
        writer.write_raw(image.data, label=label)


def _write_errors(out: Path, errors: list[tuple[str, str]]) -> Path | None:
    path = out.with_name(f"{out.name}.errors.txt")
    if not errors:
        path.unlink(missing_ok=True)
        return None
    path.write_text("".join(f"{image}\t{reason}\n" for image, reason in errors), encoding="utf-8", errors="replace")
    return path


def bounded_map(function: Callable[[T], R], items: Iterable[T], *, num_threads: int) -> Generator[R, None, None]:
    """`map` in threads, in order, with at most NUM_AHEAD_PER_THREAD results a thread that wait for their turn."""
    ahead: deque[Future[R]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= num_threads * NUM_AHEAD_PER_THREAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
