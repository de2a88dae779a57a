"""Features of a whole file, computed once and cached in the run's folder as a memory map."""

# N images of the file, F features

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import ConfigError
from fastssl.machine.files import lock_file
from pipelines.beton import BetonReader
from pipelines.printable import printable
from pipelines.shards.open_images import AnyImages
from pipelines.shards.sharded_images import ShardedImages

FORMAT_VERSION = 1  # part of every key: files of another version are not found


def cached_features(
    folder: Path, name: str, key: Mapping[str, Any], num_images: int, encode: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The features that `key` describes: read from the folder if cached, else computed and written.

    The file's name ends in a digest of the key, so features of another key are never found. The folder may be
    deleted at any time.

    Args:
        folder: Folder of the cache; created if missing.
        name: First, human-readable part of the file's name.
        key: Everything that the features depend on, JSON values; "dtype" is the dtype of the file.
        num_images: N.
        encode: Returns the features in order, in blocks [B, F] whose B sum to N; called only if nothing is cached.

    Returns:
        [N, F] in key["dtype"]: a copy-on-write memory map: writes to it do not change the file.

    Raises:
        ConfigError: the folder cannot be written.
        ValueError: `encode` did not return N rows.
    """
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, key], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{name}_{digest}.npy"
    features = _read(path, num_images, key["dtype"])
    if features is None:
        _write(path, num_images, key["dtype"], encode())
        features = _read(path, num_images, key["dtype"])
        assert features is not None
    return features


def data_identity(reader: AnyImages) -> dict[str, Any]:
    """Identity of a data file, as JSON values: size in bytes, number of images, CRC-32 of its tables and of some
    images, and the checksum in its sidecar.

    Without a sidecar, the modification time replaces the checksum, because not every image is in the CRC-32. With
    one that belongs to another file, these differ.
    """
    if isinstance(reader, ShardedImages):  # its digest covers the checksums of all images
        return {
            "num_images": reader.num_samples,
            "file_bytes": reader.manifest.num_bytes,
            "digest": reader.manifest.digest,
        }
    if not isinstance(reader, BetonReader):
        return {"identity": reader.identity}
    recorded = reader.sidecar.get("rows_sha256") or reader.sidecar.get("sha256")  # this of files of older versions
    checksum = recorded or f"changed {os.fstat(reader.descriptor).st_mtime_ns}"
    num_images, file_bytes, tables, images = reader.identity
    crc32 = {"tables_crc32": tables, "some_images_crc32": images}
    return {"file_bytes": file_bytes, "num_images": num_images, "checksum": checksum, **crc32}


def _read(path: Path, num_images: int, dtype: str) -> np.ndarray | None:
    """Read a cached file; None if it is missing or incomplete."""
    try:
        features = np.load(path, mmap_mode="c")
        header_bytes = features.offset
        is_whole = features.ndim == 2 and len(features) == num_images and features.dtype == np.dtype(dtype)
        is_whole = is_whole and path.stat().st_size == header_bytes + features.nbytes
    except OSError:  # missing; any other cause shows up when it is written
        return None
    except (ValueError, EOFError, AttributeError):  # a truncated header or map; an array that cannot be mapped
        is_whole = False
    if not is_whole:
        line = f"fastssl: warning: {printable(path)} is damaged; its features are computed again"
        print(line, file=sys.stderr, flush=True)
        return None
    return features


def _write(path: Path, num_images: int, dtype: str, blocks: Iterable[np.ndarray]) -> None:
    """Write under a temporary name, then rename. Not through a memory map: a full disk would kill the process."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            lock_file(file)
            _remove_abandoned(path.parent, ours=temporary)
            num_written = 0
            for block in blocks:
                if num_written == 0:
                    shape = (num_images, block.shape[1])
                    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(block, dtype).data)
                num_written += len(block)
            if num_written != num_images:
                raise ValueError(f"the encoder returned {num_written} feature vectors for {num_images} images")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _remove_abandoned(folder: Path, *, ours: Path) -> None:
    """Remove the temporary files of killed processes: nobody holds their locks."""
    for temporary in set(folder.glob(".*.npy.*.tmp")) - {ours}:
        with suppress(OSError), temporary.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
