"""Converts images to a .beton file."""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.beton import BetonWriter
from pipelines.beton.format import checkpoint_path, partial_path, sidecar_path
from pipelines.beton.sidecar import read_sidecar
from pipelines.convert.images import (
    MAX_JPEG_SIDE_PX,
    CorruptImageError,
    StoredImage,
    quiet_pillow,
    silence_pillow,
    store_items,
)
from pipelines.convert.source import MAX_ITEMS, Item, Source
from pipelines.convert.sources import SourceKind, SourceOptions, build_source
from pipelines.errors import DataError
from pipelines.printable import printable
from pipelines.progress import Progress

__all__ = ["ConvertReport", "SourceKind", "convert", "convert_shards"]

NUM_ITEMS_PER_TASK = 8
MAX_TASK_BYTES = 8 << 20  # of images that were read already; a task ends with the image that exceeds this
NUM_TASKS_AHEAD = 2  # per thread or process; finished images waiting for the writer; bounds the memory
MAX_SHARDS = 99_999
MAX_WORKERS = 1024
MAX_NAME_CHARS = 8192  # in the list of skipped images; a path has at most 4096 bytes
CHECKPOINT_EVERY_S = 10.0

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """Result of a conversion.

    Attributes:
        out: The .beton file.
        num_images: Number of images in the file: the sum of the next three.
        num_passed: JPEG files whose bytes were kept unchanged.
        num_encoded: Images re-encoded as JPEG.
        num_raw: Images stored as pixels.
        num_skipped: Corrupt images that were skipped.
        num_ignored: Files of the source without the extension of an image.
        errors_path: List of the skipped images, one `path<TAB>reason` per line; None if there are none.
        wall_s: Duration of this process in seconds.
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


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options shared by all files of one call; see `convert`."""

    max_px: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    quality: int = 95
    overwrite: bool = False
    resume: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.max_px is not None and not 1 <= self.max_px <= MAX_JPEG_SIDE_PX:
            raise ValueError(f"max_px must be 1..{MAX_JPEG_SIDE_PX}, not {self.max_px}")
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"on_error must be fail or skip, not {self.on_error!r}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1..100, not {self.quality}")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise ValueError(f"workers must be 0..{MAX_WORKERS}, not {self.num_workers}")


@dataclass(kw_only=True)
class _Done:
    """Progress of a file, saved in checkpoints as JSON values."""

    fingerprint: str
    num_read: int = 0
    how: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)


def convert(
    source_kind: SourceKind,
    src: str | None,
    out: str | Path,
    *,
    max_px: int | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    quality: int = 95,
    overwrite: bool = False,
    resume: bool = False,
    num_workers: int = 0,
    **source_options: Any,
) -> ConvertReport:
    """Write a .beton file and its sidecar. Every image is decoded once, so that corrupt images are found.

    Args:
        source_kind: See `sources.build_source`.
        src: The folder, file, file pattern or name; None for "digits".
        out: The .beton file; its folder is created.
        max_px: Downscale images whose longer side exceeds this.
        on_error: What to do with a corrupt image: "fail" stops; "skip" leaves it out and lists it in
            `<out>.errors.txt`.
        quality: JPEG quality of re-encoded images, 1..100.
        overwrite: Replace an existing file, and the partial files of an unfinished conversion.
        resume: Resume a killed conversion of the same source and options. The result is the same file as that of an
            uninterrupted conversion. If the conversion is already finished, nothing is done.
        num_workers: Processes that read, check and encode; 0: one thread of this process per core.
        source_options: Fields of `sources.SourceOptions`, e.g. split.
    Raises:
        ValueError: an option is out of range, or the source does not support it.
        DataError: bad source, a corrupt image with on_error="fail", only corrupt images, `out` exists, or the partial
            files belong to another source or other options.
    """
    source, options, about = _prepare(
        source_kind,
        src,
        {
            "max_px": max_px,
            "on_error": on_error,
            "quality": quality,
            "overwrite": overwrite,
            "resume": resume,
            "num_workers": num_workers,
            **source_options,
        },
    )
    return _convert_range(source, Path(out), 0, source.num_items, options, about)


def convert_shards(
    source_kind: SourceKind,
    src: str | None,
    out: str | Path,
    *,
    num_shards: int,
    shard: int | None = None,
    **options: Any,
) -> list[ConvertReport]:
    """Write contiguous ranges of equal size of a source to separate files: `x.beton` -> `x-00000-of-00004.beton`.

    Of N items, shard k holds N*k//num_shards up to N*(k+1)//num_shards, without the corrupt ones.

    Args:
        source_kind: See `convert`.
        src: See `convert`.
        out: Base name of the files.
        num_shards: Number of files, 1..99,999.
        shard: Write only this shard, 0..num_shards-1, so that several machines can share the work.
        options: Further options of `convert`; with resume, finished shards are left unchanged.
    Raises:
        ValueError: see `convert`, or a number out of range.
        DataError: see `convert`, or fewer items than shards.
    """
    if not 1 <= num_shards <= MAX_SHARDS:
        raise ValueError(f"shards must be 1..{MAX_SHARDS}, not {num_shards}")
    if shard is not None and not 0 <= shard < num_shards:
        raise ValueError(f"shard must be 0..{num_shards - 1}, not {shard}")
    source, checked, about = _prepare(source_kind, src, options)
    if source.num_items < num_shards:
        raise DataError(f"{source.name}: {source.num_items} images are too few for {num_shards} shards")
    about = about | {"num_shards": num_shards}
    reports = []
    for k in range(num_shards) if shard is None else (shard,):
        start, stop = source.num_items * k // num_shards, source.num_items * (k + 1) // num_shards
        reports.append(_convert_range(source, shard_path(out, k, num_shards), start, stop, checked, about))
    return reports


def shard_path(out: str | Path, shard: int, num_shards: int) -> Path:
    """`x.beton` -> `x-00000-of-00004.beton`."""
    out = Path(out)
    return out.with_name(f"{out.stem}-{shard:05d}-of-{num_shards:05d}{out.suffix}")


def _prepare(
    source_kind: SourceKind, src: str | None, options: dict[str, Any]
) -> tuple[Source, _Options, dict[str, Any]]:
    """Return the source, the conversion options, and the sidecar's entries about the source."""
    names = {item.name for item in fields(_Options)}
    checked = _Options(**{name: value for name, value in options.items() if name in names})
    source_options = SourceOptions(**{name: value for name, value in options.items() if name not in names})
    source = build_source(source_kind, src, source_options)
    for note in source.notes:
        print(printable(note))
    about = {"source_kind": source_kind, **asdict(source_options)}
    if source_options.classes is None:  # files from before there was this option keep their identity
        del about["classes"]
    return source, checked, about


def _convert_range(
    source: Source, out: Path, start: int, stop: int, options: _Options, about: dict[str, Any]
) -> ConvertReport:
    """Write items start..stop-1 of a source."""
    start_s = time.monotonic()
    about = about | {"max_px": options.max_px, "quality": options.quality}  # not on_error: a resumed run may change it
    identity = f"{source.fingerprint} {start} {stop} {json.dumps(about, sort_keys=True)}"
    if options.resume and out.exists() and not options.overwrite:
        done = _Done(fingerprint=identity)
        if _finished_identity(out) != identity:
            raise DataError(f"{out}: exists already, of another source or other options; choose another name")
        if not partial_path(out).exists():  # killed after the file had its name
            checkpoint_path(out).unlink(missing_ok=True)
        print(f"{printable(out)}: finished already")
        return _report(out, done, source, None, start_s)
    if stop - start > MAX_ITEMS:
        raise DataError(f"{source.name}: {stop - start:,} images; a file holds at most {MAX_ITEMS:,}: pass --shards")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = BetonWriter(
            out,
            stop - start,
            class_names=source.class_names,
            source=printable(source.name),
            options=about | {"on_error": options.on_error, "identity": identity},
            overwrite=options.overwrite,
            resume=options.resume,
        )
        with writer:
            done = _Done(**(writer.note or {"fingerprint": identity}))
            if done.fingerprint != identity:
                raise DataError(
                    f"{partial_path(out)}: of another source or other options; pass --overwrite to start again"
                )
            _write_all(writer, source, start, stop, options, done)
            errors_path = _write_errors(out, done.errors)
            if not writer.num_samples:
                raise DataError(f"{source.name}: all {len(done.errors)} images are corrupt; see {errors_path}")
    except BrokenExecutor as error:
        raise DataError(f"{out}: a worker process died, perhaps for lack of memory; try fewer workers") from error
    except MemoryError as error:
        raise DataError(f"{source.name}: its images need more memory than there is; try fewer workers") from error
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
    if done.errors:
        print(
            f"{len(done.errors)} of {stop - start} images are corrupt and were left out; see {printable(errors_path)}"
        )
    return _report(out, done, source, errors_path, start_s)


def _finished_identity(out: Path) -> object:
    try:
        return read_sidecar(sidecar_path(out))["options"]["identity"]
    except (OSError, KeyError, TypeError):
        return None


def _report(out: Path, done: _Done, source: Source, errors_path: Path | None, start_s: float) -> ConvertReport:
    return ConvertReport(
        out=out,
        num_images=sum(done.how.values()),
        num_passed=done.how.get("passed", 0),
        num_encoded=done.how.get("encoded", 0),
        num_raw=done.how.get("raw", 0),
        num_skipped=len(done.errors),
        num_ignored=source.num_ignored,
        errors_path=errors_path,
        wall_s=time.monotonic() - start_s,
    )


def _write_all(writer: BetonWriter, source: Source, start: int, stop: int, options: _Options, done: _Done) -> None:
    """Write every valid image; corrupt ones are added to `done.errors`, or raise DataError with on_error="fail"."""
    how = Counter(done.how)
    noted_s = time.monotonic()
    items = source.read(start + done.num_read, stop)
    results = _stored(items, options)
    with quiet_pillow(), closing(results), Progress(writer.path.name, stop - start, done.num_read) as progress:
        for item, result in results:
            if isinstance(result, StoredImage):
                _write(writer, result, item.label)
                how[result.how] += 1
            elif options.on_error == "fail":
                raise DataError(f"{item.name}: {result}; repair or remove it, or pass --on-error skip")
            else:
                done.errors.append((item.name, str(result)))
            done.num_read += 1
            progress.advance()
            if time.monotonic() - noted_s >= CHECKPOINT_EVERY_S:
                done.how = dict(how)
                writer.checkpoint(asdict(done))
                noted_s = time.monotonic()
    done.how = dict(how)
    if done.num_read != stop - start:
        raise DataError(f"{source.name}: changed while it was read; convert again")


def _stored(
    items: Iterator[Item], options: _Options
) -> Generator[tuple[Item, StoredImage | CorruptImageError], None, None]:
    """Yield each item, in order, with its result: the image to store, or the error."""
    num_workers = options.num_workers or len(os.sched_getaffinity(0))
    tasks: deque[list[Item]] = deque()

    def batches() -> Iterator[list[Item]]:
        for batch in _grouped(items):
            tasks.append(batch)
            yield batch

    pool = _build_pool(options.num_workers, num_workers)
    call = _StoreItems(options.max_px, options.quality)
    with closing(bounded_map(call, batches(), pool, max_ahead=num_workers * NUM_TASKS_AHEAD)) as results:
        for result in results:
            yield from zip(tasks.popleft(), result, strict=True)


def _grouped(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    num_bytes = 0
    for item in items:
        batch.append(item)
        num_bytes += len(item.image) if isinstance(item.image, bytes) else 0
        if len(batch) == NUM_ITEMS_PER_TASK or num_bytes > MAX_TASK_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _StoreItems:
    """`store_items` bound to its options, so that it can be sent to another process."""

    max_px: int | None
    quality: int

    def __call__(self, items: list[Item]) -> list[StoredImage | CorruptImageError]:
        return store_items(items, self.max_px, self.quality)


def _build_pool(num_processes: int, num_threads: int) -> Executor:
    if not num_processes:
        return ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-convert")
    context = get_context("forkserver")
    return ProcessPoolExecutor(num_processes, context, initializer=silence_pillow)


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
    lines = (f"{printable(image, MAX_NAME_CHARS)}\t{printable(reason)}\n" for image, reason in errors)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def bounded_map(
    function: Callable[[T], R], items: Iterable[T], pool: Executor, *, max_ahead: int
) -> Generator[R, None, None]:
    """`map` in a pool, in order, with at most `max_ahead` items in progress or waiting; finally shuts the pool down."""
    ahead: deque[Future[R]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) >= max_ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
