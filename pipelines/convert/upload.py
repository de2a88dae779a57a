"""Puts a converted file and its neighbours into object storage.

Of a .beton and its neighbours, the sidecar is put first and the .beton last. The sidecar holds the checksums of the
others and is put only where nothing is: of several tasks that convert one shard, it decides whose content counts, and a
task with another content ends there. Whoever finds the .beton finds a whole data set. A task that is killed leaves
neighbours without a .beton, with which the same conversion goes on.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from urllib.parse import unquote

from pipelines.beton.format import sidecar_path
from pipelines.beton.sidecar import MAX_SIDECAR_BYTES, parse_sidecar
from pipelines.errors import DataError, SourceChangedError
from pipelines.remote import RemoteError, RemoteStore

_CHECKSUMS = ("rows_sha256", "hashes_crc32")  # of a sidecar: what tells the content
_CHOICE = "convert again under another name, or with --overwrite"


class Destination:
    """A .beton in object storage; a context manager.

    Attributes:
        name: Its name in the folder.
        url: Its URL, without secrets.
    """

    def __init__(self, url: str) -> None:
        """Name the file; nothing is sent yet.

        Raises:
            RemoteError: no URL of object storage, or it names no file.
        """
        folder, _, name = url.rpartition("/")
        self.name = unquote(name)
        if not name or folder.endswith(":/") or "/" in self.name or self.name in (".", ".."):
            raise RemoteError("OUT needs a bucket and a name, such as s3://bucket/photos/x.beton")
        self._below = RemoteStore(url)
        if url.lower().startswith("http"):  # the only ones with a query
            raise RemoteError(f"{self._below.shown}: a web server cannot be written to: use object storage or a folder")
        self._store = RemoteStore(folder)
        self.url = self.shown(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._below.close()

    def shown(self, name: str) -> str:
        """The URL of a file next to it, without secrets."""
        return f"{self._store.shown}/{name}"

    def find(self) -> dict[str, Any] | None:
        """Contents of the sidecar of a finished file, empty if it has none; None: there is no such file.

        Raises:
            RemoteError: no access, or no such bucket.
            DataError: the sidecar is damaged.
        """
        if self._store.info(self.name) is not None:
            return self.sidecar() or {}
        # A bucket that does not exist has no object of any name either; only a list tells.
        self._below.list()
        return None

    def sidecar(self) -> dict[str, Any] | None:
        """Contents of the sidecar, also of an unfinished file; None: there is none."""
        name = _sidecar_name(self.name)
        if self._store.info(name) is None:
            return None
        return parse_sidecar(self._store.get_whole(name, MAX_SIDECAR_BYTES)[0], self.shown(name))

    def holds(self, path: Path) -> bool:
        """Whether there is an object with the name of a local file."""
        return self._store.info(path.name) is not None

    def put(self, out: Path, neighbours: Sequence[Path], *, overwrite: bool) -> bool:
        """Put a local .beton, its sidecar and its other neighbours; see the top of this module for the order.

        Args:
            out: The local file.
            neighbours: Those that belong to it, also if they do not exist: then no file has their name afterwards.
            overwrite: Replace what is there. The old .beton is removed first: a task that is killed leaves no mixture.
        Returns:
            False: another task has put the same file meanwhile.
        Raises:
            SourceChangedError: there are neighbours of another conversion.
            RemoteError: an object cannot be written.
            OSError: a local file cannot be read.
        """
        sidecar = sidecar_path(out)
        if overwrite:
            self._store.remove(self.name)
            for path in neighbours:
                if not path.exists():
                    self._store.remove(path.name)
        if not self._store.put(sidecar.name, sidecar, create_only=not overwrite):
            self._check_sidecar(sidecar)
        for path in neighbours:
            if path.exists():
                created = self._store.put(path.name, path, create_only=not overwrite)
                if not created and not self._store.holds(path.name, path):
                    raise self._other(path.name)
        return self._store.put(self.name, out, create_only=not overwrite)

    def _check_sidecar(self, path: Path) -> None:
        found, own = self.sidecar() or {}, parse_sidecar(path.read_bytes(), path)
        if any(found.get(key) != own.get(key) for key in _CHECKSUMS) or identity_in(found) != identity_in(own):
            raise self._other(path.name)

    def check_identity(self, found: dict[str, Any], identity: str, *, is_finished: bool) -> None:
        """Refuse to go on with the files of another conversion.

        Args:
            found: Contents of the sidecar.
            identity: What it must hold.
            is_finished: Whether the .beton is there as well.
        """
        if identity_in(found) != identity:
            if not is_finished:
                raise self._other(_sidecar_name(self.name))
            raise SourceChangedError(f"{self.url}: exists already, of another source or other options; {_CHOICE}")

    def _other(self, name: str) -> SourceChangedError:
        return SourceChangedError(
            f"{self.shown(name)}: of another conversion to this name, at the same time or before; {_CHOICE}"
        )


def identity_in(found: dict[str, Any]) -> object:
    """The identity of the conversion in the contents of a sidecar; None: there is none."""
    options = found.get("options")
    return options.get("identity") if isinstance(options, dict) else None


@contextmanager
def work_folder(work_dir: str | Path | None, destination: Destination) -> Iterator[Path]:
    """A local folder in which a file is written before it is put; removed at the end.

    Args:
        work_dir: Where it is created; it is found again by the same conversion, and stays after a failure or a kill, so
            that a conversion can be resumed. None: in the system's temporary folder, never found again.
        destination: Where the file is put.
    Raises:
        DataError: it cannot be created, or another process of this machine uses it.
    """
    if work_dir is None:
        try:
            temporary = TemporaryDirectory(prefix="fastssl-convert-", ignore_cleanup_errors=True)
        except OSError as error:
            raise DataError(f"no temporary folder can be created ({error.strerror}): pass --work-dir") from error
        with temporary as name:
            yield Path(name)
        return
    folder = Path(work_dir) / f"{destination.name}.{hashlib.sha256(destination.url.encode()).hexdigest()[:12]}"
    lock = _locked(folder, destination)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # of use only if there is something to resume from
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(folder: Path, destination: Destination) -> int:
    """Create and lock a folder; its descriptor. The lock ends with the process."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise DataError(f"{folder}: cannot be created ({error.strerror}): choose another --work-dir") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(folder)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise DataError(f"{folder}: another process is converting {destination.url} in it") from None
        except FileNotFoundError:  # its last user has just removed it
            pass
        os.close(lock)


def _sidecar_name(name: str) -> str:
    return sidecar_path(Path(name)).name
