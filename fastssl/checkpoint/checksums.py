"""Checksums of a checkpoint: manifest.json has size and SHA-256 of each file, so that damage is detected."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastssl.checkpoint.tensor_file import DamagedError
from fastssl.errors import ConfigError
from fastssl.machine.environment import package_version
from fastssl.machine.files import sync_file
from pipelines.files import open_regular, read_file

MANIFEST = "manifest.json"
FORMAT_VERSION = 2  # 1 was DeepSpeed's files, without a manifest
_OLD_FORMAT_FILES = "*_model_states.pt"
_MAX_MANIFEST_BYTES = 64 << 20  # 150 bytes per process


def save_file(value: Any, path: Path) -> dict[str, Any]:
    """`torch.save` to a file, synced to disk before returning; hashed while writing, so that it is not read again.

    Returns:
        Its entry in a manifest: "bytes" and "sha256".
    Raises:
        ConfigError: the file cannot be written, for example because the disk is full.
    """
    try:
        with path.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(value, hashing)  # pyright: ignore[reportArgumentType] it only writes, from start to end
            sync_file(file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails inside it
        reason = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError)), None) or str(error)
        raise ConfigError(f"{path} cannot be written ({reason}): free space, then run.resume=auto") from None
    return {"bytes": hashing.num_bytes, "sha256": hashing.digest.hexdigest()}


def write_manifest(
    folder: Path, files: Mapping[str, Mapping[str, Any]], *, world_size: int, run: Mapping[str, str] | None = None
) -> None:
    """Write manifest.json, the last file of a checkpoint.

    Args:
        folder: The checkpoint's folder.
        files: File name -> entry from `save_file`.
        world_size: Number of processes that saved.
        run: Identity of the run, from `RunFolder.identity`; None: it has none.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "world_size": world_size,
        **({"run": dict(run)} if run else {}),
        "torch": package_version("torch"),
        "deepspeed": package_version("deepspeed"),
        "files": {name: dict(files[name]) for name in sorted(files)},
    }
    with (folder / MANIFEST).open("w") as file:
        json.dump({**content, "sha256_of_the_above": _digest(content)}, file, indent=2)
        sync_file(file)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of manifest.json.

    Raises:
        DamagedError: it is missing or damaged.
        ConfigError: the checkpoint has a format that this version does not read.
    """
    path = folder / MANIFEST
    if not path.exists() and any(folder.glob(_OLD_FORMAT_FILES)):
        raise ConfigError(
            f"{folder} was written by an older version of fastssl, with DeepSpeed's files: it cannot be resumed; its "
            "weights.pt can be taken with run.init_from"
        )
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    try:
        content: dict[str, Any] = json.loads(read_file(path, _MAX_MANIFEST_BYTES))
        is_same = content.pop("sha256_of_the_above") == _digest(content)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise DamagedError(f"{path} is damaged: it is not a manifest") from None
    if not is_same:
        raise DamagedError(f"{path} is damaged: its sha256 is another")
    version = content.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise ConfigError(f"{folder} has format {version}, this version of fastssl reads {FORMAT_VERSION}")
    if version is None or not _is_complete(content):
        raise DamagedError(f"{path} is damaged: it does not list the files of a checkpoint")
    return content


def _is_complete(content: Mapping[str, Any]) -> bool:
    world_size, files, run = content.get("world_size"), content.get("files"), content.get("run", {})
    if type(world_size) is not int or not isinstance(files, dict) or len(files) != world_size + 2:
        return False
    if not isinstance(run, dict) or not all(isinstance(value, str) for value in run.values()):
        return False
    expected = {"state.pt", "weights.pt", *(f"rank_{rank}.pt" for rank in range(world_size))}
    return files.keys() == expected and all(map(_is_entry, files.values()))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def check_folder(folder: Path) -> None:
    """Read every file of a checkpoint and compare it with the manifest.

    Raises:
        DamagedError: a file is missing, truncated or changed.
        ConfigError: the checkpoint has a format that this version does not read.
    """
    for name, entry in read_manifest(folder)["files"].items():
        _check(folder / name, entry)


def check_file(path: Path) -> bool:
    """Check one file; a file without a manifest in its folder, such as a copied weights.pt, is not checked.

    Returns:
        Whether it was checked.
    Raises:
        DamagedError: it is missing, truncated or changed.
        ConfigError: the checkpoint has a format that this version does not read.
    """
    if (path.parent / MANIFEST).exists():
        entry = read_manifest(path.parent)["files"].get(path.name)
        if entry is not None:
            _check(path, entry)
            return True
    return False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry["bytes"]:
            raise DamagedError(f"{path} is damaged: it has {num_bytes} bytes, not {entry['bytes']}")
        if sha256_of(path) != entry["sha256"]:
            raise DamagedError(f"{path} is damaged: its sha256 is another")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Hashing:
    """File wrapper for `torch.save` that hashes what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()
