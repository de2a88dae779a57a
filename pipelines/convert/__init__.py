"""Converts images to a .beton file."""

import errno
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.beton import BetonWriter
from pipelines.beton.format import checkpoint_path, hashes_path, partial_path, sidecar_path
from pipelines.beton.sidecar import read_sidecar
from pipelines.convert.image_files import left_out_lines
from pipelines.convert.images import (
    MAX_JPEG_SIDE_PX,
    CorruptImageError,
    StoredImage,
    quiet_pillow,
    silence_pillow,
    store_items,
)
from pipelines.convert.infer_kind import infer_kind
from pipelines.convert.shuffle import shuffled
from pipelines.convert.source import MAX_ITEMS, Item, Source
from pipelines.convert.sources import SourceKind, SourceOptions, build_source, join_sources
from pipelines.convert.upload import Destination, identity_in, work_folder
from pipelines.errors import DataError, SourceChangedError
from pipelines.printable import printable
from pipelines.progress import Progress
from pipelines.remote import is_url
from pipelines.shards.rows import rows_path

__all__ = ["ConvertReport", "SourceKind", "convert", "convert_shards", "infer_kind"]

NUM_ITEMS_PER_TASK = 8
MAX_TASK_BYTES = 8 << 20  # of images that were read already; a task ends with the image that exceeds this
NUM_TASKS_AHEAD = 2  # per thread or process; finished images waiting for the writer; bounds the memory
MAX_SHARDS = 99_999
MAX_WORKERS = 1024
MAX_NAME_CHARS = 8192  # in a list of files; a path has at most 4096 bytes
DEFAULT_MAX_BAD = 0.1
NUM_NAMES_SHOWN, NUM_REASONS_SHOWN = 3, 8
CHECKPOINT_EVERY_S = 10.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """Result of a conversion.

    Attributes:
        out: The .beton file; in object storage, its name in the folder there.
        num_images: Number of images in the file: the sum of the next three, where they are known. Of a file that was
            finished already, num_passed, num_encoded and num_skipped are 0, as the file does not tell them.
        num_passed: JPEG files whose bytes were kept unchanged.
        num_encoded: Images re-encoded as JPEG.
        num_raw: Images stored as pixels.
        num_skipped: Corrupt images that were skipped.
        num_ignored: Files and folders of the source that were left out.
        left_out: Their number by kind, such as ".txt", "empty", "hidden".
        num_copies: Images whose stored bytes are those of an earlier one.
        num_similar: Further images that look almost like an earlier one; None: too many images to count.
        errors_path: List of the skipped images, one `path<TAB>reason` per line; None if there are none.
        left_out_path: List of what was left out, one `path<TAB>kind` per line; None if there is nothing.
        wall_s: Duration of this process in seconds.
        url: Of the file in object storage, next to which are the lists; None: the file is local.
    """

    out: Path
    num_images: int
    num_passed: int
    num_encoded: int
    num_raw: int
    num_skipped: int
    num_ignored: int
    left_out: dict[str, int]
    num_copies: int
    num_similar: int | None
    errors_path: Path | None
    left_out_path: Path | None
    wall_s: float
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options shared by all files of one call; see `convert`."""

    max_px: int | None = None
    on_error: Literal["fail", "skip"] | None = None
    max_bad: float | None = None
    quality: int = 95
    overwrite: bool = False
    resume: bool = False
    num_workers: int = 0
    shuffle: int | None = None
    work_dir: str | Path | None = None

    @property
    def max_bad_fraction(self) -> float:
        """Largest fraction of bad images."""
        if self.on_error is not None:
            return 0.0 if self.on_error == "fail" else 1.0
        return DEFAULT_MAX_BAD if self.max_bad is None else self.max_bad

    def __post_init__(self) -> None:
        if self.max_px is not None and not 1 <= self.max_px <= MAX_JPEG_SIDE_PX:
            raise ValueError(f"max_px must be 1..{MAX_JPEG_SIDE_PX}, not {self.max_px}")
        if self.on_error not in (None, "fail", "skip"):
            raise ValueError(f"on_error must be fail or skip, not {self.on_error!r}")
        if self.max_bad is not None and not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad must be a fraction in 0..1, not {self.max_bad}")
        if self.max_bad is not None and self.on_error is not None:
            raise ValueError("max_bad and on_error exclude each other: fail is max_bad 0, skip is max_bad 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1..100, not {self.quality}")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise ValueError(f"workers must be 0..{MAX_WORKERS}, not {self.num_workers}")
        if self.shuffle is not None and not 0 <= self.shuffle < 1 << 64:
            raise ValueError(f"shuffle must be a seed in 0..2**64-1, not {self.shuffle}")


@dataclass(kw_only=True)
class _Done:
    """Progress of a file, saved in checkpoints as JSON values."""

    fingerprint: str
    num_read: int = 0
    how: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[str, str]] = field(default_factory=list)


def convert(
    source_kind: SourceKind | None,
    src: Path | str | Sequence[Path | str] | None,
    out: str | Path,
    *,
    max_px: int | None = None,
    on_error: Literal["fail", "skip"] | None = None,
    max_bad: float | None = None,
    quality: int = 95,
    overwrite: bool = False,
    resume: bool = False,
    num_workers: int = 0,
    shuffle: int | None = None,
    work_dir: str | Path | None = None,
    **source_options: Any,
) -> ConvertReport:
    """Write a .beton file and its sidecar. Every image is checked, so that corrupt images are found.

    Corrupt images are left out and listed in `<out>.errors.txt`, other files of a folder in `<out>.left_out.txt`; lines
    are printed that sum up both.

    Args:
        source_kind: See `sources.build_source`; None: see `infer_kind`.
        src: The folder, file, file pattern or name; None for "digits". Several sources are written one after the other,
            and classes of one name are one class; see `sources.join_sources`.
        out: The .beton file, whose folder is created; or its URL in object storage, such as s3://bucket/x.beton: it is
            written in a local folder and then put, see `pipelines.convert.upload`.
        max_px: Downscale images whose longer side exceeds this.
        on_error: "fail" is max_bad=0, and "skip" max_bad=1.
        max_bad: The conversion fails when more than this fraction of the images is corrupt (default: 0.1). Resumed with
            a larger fraction, it continues.
        quality: JPEG quality of re-encoded images, 1..100.
        overwrite: Replace an existing file, and the partial files of an unfinished conversion.
        resume: Resume a killed conversion of the same source and options. The result is the same file as that of an
            uninterrupted conversion. If the conversion is already finished, nothing is done.
        num_workers: Processes that read, check and encode; 0: one thread of this process per core.
        shuffle: Write the images in a random order, which this seed gives; None: in the source's order.
        work_dir: With a URL: where the local folder is created; see `upload.work_folder`.
        source_options: Fields of `sources.SourceOptions`, e.g. split.
    Raises:
        ValueError: an option is out of range, or the source does not support it.
        DataError: bad source, too many corrupt images, only corrupt images, `out` exists, the partial files belong to
            another source or other options, or a source to be shuffled can only be read in order.
    """
    _check_out(out, work_dir)
    source, options, about = _prepare(
        source_kind,
        src,
        {
            "max_px": max_px,
            "on_error": on_error,
            "max_bad": max_bad,
            "quality": quality,
            "overwrite": overwrite,
            "resume": resume,
            "num_workers": num_workers,
            "shuffle": shuffle,
            "work_dir": work_dir,
            **source_options,
        },
    )
    return _convert_part(source, out, 0, source.num_items, options, about)


def convert_shards(
    source_kind: SourceKind | None,
    src: Path | str | Sequence[Path | str] | None,
    out: str | Path,
    *,
    num_shards: int,
    shard: int | None = None,
    **options: Any,
) -> list[ConvertReport]:
    """Write contiguous ranges of equal size of a source to separate files: `x.beton` -> `x-00000-of-00004.beton`.

    With shuffle, these are ranges of its random order.

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
    _check_out(out, options.get("work_dir"))
    source, checked, about = _prepare(source_kind, src, options)
    if source.num_items < num_shards:
        raise DataError(f"{source.name}: {source.num_items} images are too few for {num_shards} shards")
    about = about | {"num_shards": num_shards}
    reports = []
    for k in range(num_shards) if shard is None else (shard,):
        start, stop = source.num_items * k // num_shards, source.num_items * (k + 1) // num_shards
        reports.append(_convert_part(source, _shard_out(out, k, num_shards), start, stop, checked, about))
    return reports


def shard_path(out: str | Path, shard: int, num_shards: int) -> Path:
    """`x.beton` -> `x-00000-of-00004.beton`."""
    out = Path(out)
    return out.with_name(f"{out.stem}-{shard:05d}-of-{num_shards:05d}{out.suffix}")


def _shard_out(out: str | Path, shard: int, num_shards: int) -> str | Path:
    """`shard_path`, also for a URL."""
    if not is_url(str(out)):
        return shard_path(out, shard, num_shards)
    folder, _, name = str(out).rpartition("/")
    return f"{folder}/{shard_path(name, shard, num_shards)}"


def _check_out(out: str | Path, work_dir: str | Path | None) -> None:
    """Refuse a destination that cannot be one, before the source is read."""
    if is_url(str(out)):
        with Destination(str(out)):
            pass
    elif work_dir is not None:
        raise ValueError("work_dir is for an OUT in object storage, such as s3://bucket/x.beton")


def _prepare(
    source_kind: SourceKind | None, src: Path | str | Sequence[Path | str] | None, options: dict[str, Any]
) -> tuple[Source, _Options, dict[str, Any]]:
    """Return the source, the conversion options, and the sidecar's entries about the source."""
    names = {item.name for item in fields(_Options)}
    checked = _Options(**{name: value for name, value in options.items() if name in names})
    source_options = SourceOptions(**{name: value for name, value in options.items() if name not in names})
    each: list[Any] = [src] if src is None or isinstance(src, str | os.PathLike) else list(src)
    kinds: list[SourceKind] = [source_kind or infer_kind(one) for one in each]
    met: set[tuple[int, int]] = set()
    source = join_sources([build_source(k, one, source_options, met) for k, one in zip(kinds, each, strict=True)])
    for note in source.notes:
        print(printable(note))
    about = {"source_kind": ", ".join(kinds), **asdict(source_options)}
    for name, default in (("classes", None), ("labels", "auto")):
        if about[name] == default:  # files from before there was this option keep their identity
            del about[name]
    if checked.shuffle is not None:
        return shuffled(source, checked.shuffle), checked, about | {"shuffle": checked.shuffle}
    return source, checked, about


@dataclass(frozen=True)
class _Place:
    """What messages say about files that are moved or removed after a conversion.

    Attributes:
        destination: Where they are put; None: they stay where they are.
        is_kept: Whether they stay where they are if the conversion fails.
    """

    destination: Destination | None = None
    is_kept: bool = True

    def shown(self, path: Path) -> str:
        """A file, where it will be."""
        return self.destination.shown(path.name) if self.destination else str(path)

    def see(self, errors_path: Path | None) -> str:
        """Where the list of errors of a conversion that failed is."""
        return f"see {errors_path}" if self.is_kept else "--work-dir DIR keeps their list"


def _convert_part(
    source: Source, out: str | Path, start: int, stop: int, options: _Options, about: dict[str, Any]
) -> ConvertReport:
    """Write items start..stop-1 of a source to a local file or to object storage."""
    about = about | {"max_px": options.max_px, "quality": options.quality}  # not max_bad: a resumed run may change it
    identity = f"{source.fingerprint} {start} {stop} {json.dumps(about, sort_keys=True)}"
    if not is_url(str(out)):
        return _convert_range(source, Path(out), start, stop, options, about, identity, _Place())
    with Destination(str(out)) as destination:
        return _convert_and_put(source, destination, start, stop, options, about, identity)


def _convert_and_put(
    source: Source,
    destination: Destination,
    start: int,
    stop: int,
    options: _Options,
    about: dict[str, Any],
    identity: str,
) -> ConvertReport:
    start_s = time.monotonic()
    if not options.overwrite:
        found = destination.find()
        if found is not None and not options.resume:
            raise DataError(f"{destination.url}: exists already; choose another name or pass --overwrite")
        if found is not None:
            destination.check_identity(found, identity, is_finished=True)
            print(f"{printable(destination.url)}: finished already")
            done = _Done(fingerprint=identity)
            report = _report(Path(destination.name), done, found, source, start_s, has=destination.holds)
            return replace(report, url=destination.url)
        if (found := destination.sidecar()) is not None:
            destination.check_identity(found, identity, is_finished=False)
    with work_folder(options.work_dir, destination) as folder:
        out = folder / destination.name
        place = _Place(destination, is_kept=options.work_dir is not None)
        report = _convert_range(source, out, start, stop, options, about, identity, place)
        lists = _errors_path(out), _left_out_path(out)
        try:
            is_own = destination.put(out, [rows_path(out), hashes_path(out), *lists], overwrite=options.overwrite)
        except OSError as error:
            raise DataError(f"{error.filename or out}: cannot be read ({error.strerror})") from error
        if not is_own:
            print(f"{printable(destination.url)}: another task has finished it meanwhile")
        return replace(
            report,
            out=Path(destination.name),
            errors_path=report.errors_path and Path(report.errors_path.name),
            left_out_path=report.left_out_path and Path(report.left_out_path.name),
            wall_s=time.monotonic() - start_s,
            url=destination.url,
        )


def _convert_range(
    source: Source,
    out: Path,
    start: int,
    stop: int,
    options: _Options,
    about: dict[str, Any],
    identity: str,
    place: _Place,
) -> ConvertReport:
    """Write items start..stop-1 of a source to a local file."""
    start_s = time.monotonic()
    if options.resume and out.exists() and not options.overwrite:
        found = _sidecar_of(out)
        if identity_in(found) != identity:
            raise SourceChangedError(
                f"{out}: exists already, of another source or other options; convert again under another name, or with "
                "--overwrite"
            )
        if not partial_path(out).exists():  # killed after the file had its name
            checkpoint_path(out).unlink(missing_ok=True)
        print(f"{printable(out)}: finished already")
        return _report(out, _Done(fingerprint=identity), found, source, start_s)
    if stop - start > MAX_ITEMS:
        raise DataError(f"{source.name}: {stop - start:,} images; a file holds at most {MAX_ITEMS:,}: pass --shards")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = BetonWriter(
            out,
            stop - start,
            class_names=source.class_names,
            source=printable(source.name),
            options=about | {"max_bad": options.max_bad_fraction, "identity": identity},
            overwrite=options.overwrite,
            resume=options.resume,
        )
        with writer:
            done = _Done(**(writer.note or {"fingerprint": identity}))
            if done.fingerprint != identity:
                raise SourceChangedError(
                    f"{partial_path(out)}: of another source or other options; convert again under another name, or "
                    "with --overwrite"
                )
            _write_all(writer, source, start, stop, options, done, place)
            errors_path = _write_list(_errors_path(out), done.errors)
            if not writer.num_samples:
                raise DataError(f"{source.name}: all {len(done.errors)} images are corrupt; {place.see(errors_path)}")
            _write_list(_left_out_path(out), source.left_out if not start else ())  # with the first shard
    except BrokenExecutor as error:
        raise DataError(f"{out}: a worker process died, perhaps for lack of memory; try fewer workers") from error
    except MemoryError as error:
        raise DataError(f"{source.name}: its images need more memory than there is; try fewer workers") from error
    except OSError as error:
        choice = " or choose another --work-dir" if place.destination else ""
        free = f"; free space{choice}, then repeat the command (of convert: with --resume)"
        free = free if error.errno in DISK_FULL else ""
        raise DataError(f"{error.filename or out}: cannot be written ({error.strerror}){free}") from error
    report = _report(out, done, read_sidecar(sidecar_path(out)), source, start_s)
    for line in _summary(report, done, source, stop - start, place):
        print(printable(line))
    return report


def _summary(report: ConvertReport, done: _Done, source: Source, num_items: int, place: _Place) -> Iterator[str]:
    """Lines about what is not in the file, and what is in it twice."""
    for line in left_out_lines(source.name, source.num_left_out):
        yield line + (f"; see {place.shown(report.left_out_path)}" if report.left_out_path else "")
    if done.errors and report.errors_path:
        reasons = _by_reason(done.errors)
        yield (
            f"{len(done.errors):,} of {num_items:,} images are corrupt and were left out: {reasons}; "
            f"see {place.shown(report.errors_path)}"
        )
    if report.num_copies or report.num_similar:
        similar = "" if report.num_similar is None else f", {report.num_similar:,} more look almost like another"
        yield f"{place.shown(report.out)}: {report.num_copies:,} images are copies of others{similar}"


def _by_reason(errors: Sequence[tuple[str, str]]) -> str:
    """`2 empty file (a.jpg, b.jpg), 1 truncated JPEG (c.jpg)`: reasons that differ in numbers alone are one."""
    groups: dict[str, list[int]] = {}
    for i, (_, reason) in enumerate(errors):
        groups.setdefault(re.sub(r"\d[\d,]*", "", reason), []).append(i)
    largest = sorted(groups.values(), key=len, reverse=True)
    parts = []
    for group in largest[:NUM_REASONS_SHOWN]:
        names = [os.path.basename(errors[i][0]) for i in group[:NUM_NAMES_SHOWN]] + ["..."] * (
            len(group) > NUM_NAMES_SHOWN
        )
        parts.append(f"{len(group):,} {errors[group[0]][1]} ({', '.join(names)})")
    num_more = sum(map(len, largest[NUM_REASONS_SHOWN:]))
    return ", ".join(parts + [f"{num_more:,} for other reasons"] * bool(num_more))


def _sidecar_of(out: Path) -> dict[str, Any]:
    """Contents of a file's sidecar; empty: there is none."""
    try:
        return read_sidecar(sidecar_path(out))
    except FileNotFoundError:
        return {}


def _part(found: dict[str, Any], key: str) -> dict[str, Any]:
    """A part of a sidecar; empty: there is none, or it was edited to another type."""
    part = found.get(key)
    return part if isinstance(part, dict) else {}


def _count(found: dict[str, Any], key: str, name: str) -> int | None:
    """A number in a part of a sidecar; None: there is none."""
    number = _part(found, key).get(name)
    return number if type(number) is int else None


def _report(
    out: Path,
    done: _Done,
    found: dict[str, Any],
    source: Source,
    start_s: float,
    has: Callable[[Path], bool] = Path.exists,
) -> ConvertReport:
    """The report on a file with this sidecar; `done.how` is empty if the file was finished already.

    `has` says whether there is a list.
    """
    errors, left_out = _errors_path(out), _left_out_path(out)
    how = done.how or {"raw": _count(found, "modes", "raw") or 0}
    return ConvertReport(
        out=out,
        num_images=found["num_images"],
        num_passed=how.get("passed", 0),
        num_encoded=how.get("encoded", 0),
        num_raw=how.get("raw", 0),
        num_skipped=len(done.errors),
        num_ignored=source.num_left_out.total(),
        left_out=dict(source.num_left_out),
        num_copies=_count(found, "duplicates", "copies") or 0,
        num_similar=_count(found, "duplicates", "similar"),
        errors_path=errors if has(errors) else None,
        left_out_path=left_out if has(left_out) else None,
        wall_s=time.monotonic() - start_s,
    )


def _write_all(
    writer: BetonWriter, source: Source, start: int, stop: int, options: _Options, done: _Done, place: _Place
) -> None:
    """Write every valid image; corrupt ones are added to `done.errors`, and raise DataError if they are too many."""
    how = Counter(done.how)
    noted_s = time.monotonic()
    items = source.read(start + done.num_read, stop)
    results = _stored(items, options)
    with quiet_pillow(), closing(results), Progress(writer.path.name, stop - start, done.num_read) as progress:
        for item, result in results:
            if isinstance(result, StoredImage):
                _write(writer, result, item.label)
                how[result.how] += 1
            elif not options.max_bad_fraction:
                raise DataError(
                    f"{item.name}: {result}; repair or remove it, or repeat the command with a larger --max-bad (of "
                    "convert: or --on-error skip)"
                )
            else:
                done.errors.append((item.name, str(result)))
            done.num_read += 1
            if len(done.errors) > options.max_bad_fraction * (stop - start):
                done.how = dict(how)
                if checkpoint_path(writer.path).exists():  # else it takes seconds to convert again
                    writer.checkpoint(asdict(done))
                raise DataError(_too_many(writer.path, done, stop - start, options.max_bad_fraction, place))
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
        sides = {"height_px": image.height_px, "width_px": image.width_px}
        writer.write_jpeg(image.data, **sides, label=label, hashes=image.hashes)
    else:
        writer.write_raw(image.data, label=label, hashes=image.hashes)


def _too_many(out: Path, done: _Done, num_items: int, max_bad: float, place: _Place) -> str:
    """The line about too many corrupt images, whose list it writes."""
    path = _write_list(_errors_path(out), done.errors)
    return (
        f"{len(done.errors):,} of the first {done.num_read:,} images are corrupt, more than --max-bad {max_bad:g} of "
        f"all {num_items:,}: {_by_reason(done.errors)}; {place.see(path)}, and repeat the command with a larger "
        "--max-bad (of convert: with --resume)"
    )


def _errors_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.errors.txt")


def _left_out_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.left_out.txt")


def _write_list(path: Path, names: Iterable[tuple[str, str]]) -> Path | None:
    """Write a line `name<TAB>why` for each; no file if there are none."""
    if not names:
        path.unlink(missing_ok=True)
        return None
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for name, why in names:
                file.write(f"{printable(name, MAX_NAME_CHARS)}\t{printable(why)}\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
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
