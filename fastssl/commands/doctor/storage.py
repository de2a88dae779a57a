"""Checks of the disks and stores that images are read from, and of the disks that checkpoints are written to."""

import os
import tempfile
import time
from pathlib import Path

from fastssl.commands.doctor.finding import Finding, Node
from pipelines.bench.disk import drop_from_cache, measure_disk
from pipelines.bench.remote import measure_ranges
from pipelines.errors import DataError
from pipelines.shards.open_images import names_dataset, open_images
from pipelines.shards.pieces import RemoteFiles
from pipelines.shards.sharded_images import ShardedImages

_SECONDS = 1.0
_PROBE_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_SLOW_BYTES_PER_S = 100e6  # sequential speed of a hard disk


def check_data(node: Node) -> Finding:
    """Speed of reading images from their disk, without the page cache."""
    if node.data is None:
        return Finding("skipped", "no data given: use --data PATH, or --cfg with data.train, to measure its disk")
    if names_dataset(node.data):
        return _check_shards(str(node.data))
    data = Path(node.data)
    if not data.exists():
        return Finding("fail", f"{data} does not exist", "mount it, or correct the path (data.train, --data)")
    file = _largest_beton(data)
    return _probe(data) if file is None else _measured(file)


def _check_shards(place: str) -> Finding:
    """Of a data set of many: its largest shard on a disk, or some ranges of a store."""
    try:
        images = open_images(place)
        assert isinstance(images, ShardedImages)
        manifest = images.manifest
        about = f"{images.path}: {len(manifest.shards):,} shards, {images.num_samples:,} images"
        if isinstance(images.files, RemoteFiles):
            speed = measure_ranges(images, seconds=_SECONDS)
            images.files.close()
            return Finding(
                "ok",
                f"{about}; {speed.bytes_per_s / 1e6:,.0f} MB/s and {speed.img_per_s:,.0f} img/s in {speed.num} blocks, "
                f"{speed.first_s * 1e3:,.0f} ms for the first one",
            )
    except DataError as error:
        advice = "correct data.train, --data or the credentials; fastssl manifest writes a manifest"
        return Finding("fail", str(error), advice)
    largest = max(manifest.shards, key=lambda shard: shard.num_bytes)
    found = _measured(images.files.folder / largest.name)
    return found._replace(detail=f"{about}; its largest shard, {found.detail}")


def _measured(file: Path) -> Finding:
    epoch, sequential = measure_disk(file, seed=0, num_threads=len(os.sched_getaffinity(0)), seconds=_SECONDS)
    if epoch.bytes_per_s is None or epoch.img_per_s is None or sequential.bytes_per_s is None:
        return Finding("ok", f"{file}: {epoch.note or sequential.note}")
    detail = (
        f"{file}: {epoch.bytes_per_s / 1e6:,.0f} MB/s and {epoch.img_per_s:,.0f} img/s in the order of an epoch, "
        f"{sequential.bytes_per_s / 1e6:,.0f} MB/s from end to end"
    )
    if file.stat().st_size < _PROBE_BYTES:
        return Finding("ok", f"{detail}; the file is too small to judge the disk by")
    if sequential.bytes_per_s < _SLOW_BYTES_PER_S or epoch.bytes_per_s < sequential.bytes_per_s / 4:
        advice = "if that is too slow (see fastssl bench loader): set data.order=quasi_random, or use a local disk"
        return Finding("warn", detail, advice)
    return Finding("ok", detail)


def check_run_dir(node: Node) -> Finding:
    """Whether run.dir is writable, and its write speed."""
    if node.cfg is None:
        return Finding("skipped", "no configuration given: use --cfg to check run.dir")
    path = Path(node.cfg.run.dir).absolute()
    existing = next(each for each in (path, *path.parents) if each.exists())
    try:
        write_bytes_per_s, _ = _write_and_read(existing)
    except OSError as error:
        return Finding("fail", f"run.dir: {existing} cannot be written ({error.strerror})", "choose another run.dir")
    return Finding("ok", f"run.dir: {existing} is writable, at {write_bytes_per_s / 1e6:,.0f} MB/s")


def _probe(folder: Path) -> Finding:
    """For a folder without a .beton file: write a file there and read it."""
    if not folder.is_dir():
        return Finding("fail", f"{folder} is neither a folder nor a .beton file", "make one with fastssl convert")
    try:
        write_bytes_per_s, read_bytes_per_s = _write_and_read(folder)
    except OSError as error:
        detail = f"{folder} holds no .beton file and cannot be written ({error.strerror})"
        return Finding("fail", detail, "fix its permissions or its mount, or convert to another folder")
    read = (
        f"{read_bytes_per_s / 1e6:,.0f} MB/s read"
        if read_bytes_per_s
        else "read speed not measured: the file stays in memory"
    )
    detail = f"{folder} holds no .beton file; {write_bytes_per_s / 1e6:,.0f} MB/s written, {read}"
    if read_bytes_per_s and read_bytes_per_s < _SLOW_BYTES_PER_S:
        return Finding("warn", detail, "set data.order=quasi_random, or use a local disk")
    return Finding("ok", detail)


def _write_and_read(folder: Path) -> tuple[float, float | None]:
    """Write and read speed of a temporary file, in bytes per second; None if the file stays in the page cache."""
    block = os.urandom(_BLOCK_BYTES)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fastssl-doctor-") as file:
        start_s = time.perf_counter()
        for _ in range(_PROBE_BYTES // _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write_s = time.perf_counter() - start_s
        if drop_from_cache(Path(file.name)):
            return _PROBE_BYTES / write_s, None
        start_s = time.perf_counter()
        file.seek(0)
        while file.read(_BLOCK_BYTES):
            pass
        return _PROBE_BYTES / write_s, _PROBE_BYTES / (time.perf_counter() - start_s)


def _largest_beton(path: Path) -> Path | None:
    if path.is_file():
        return path
    return max(path.glob("*.beton"), key=lambda file: file.stat().st_size, default=None)
