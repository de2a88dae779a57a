"""Where the files of a data set are: a folder, or another place with the same methods, such as an object store."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipelines.errors import DataError
from pipelines.files import open_regular
from pipelines.remote.store import RemoteStore, is_url
from pipelines.shards.manifest import MANIFEST_NAME


class ObjectInfo(Protocol):
    """What a store says of a file."""

    @property
    def path(self) -> str:
        """Its name relative to the store, with `/` between folders."""
        ...

    @property
    def num_bytes(self) -> int:
        """Its size."""
        ...

    @property
    def etag(self) -> str | None:
        """Its version; None: the store has none."""
        ...


class Store(Protocol):
    """Reads and writes files by their names. All methods may be called from several threads at once."""

    @property
    def shown(self) -> str:
        """The folder or URL, for messages."""
        ...

    def get(self, path: str, start: int, stop: int, etag: str | None = None) -> bytes:
        """Bytes start..stop-1 of a file, all of them.

        Args:
            path: Its name.
            start: First byte.
            stop: End.
            etag: Its version; of another version nothing is read.
        Raises:
            DataError: they cannot be read, or the file changed.
        """
        ...

    def get_whole(self, path: str, max_bytes: int) -> tuple[bytes, str | None]:
        """Content and version of a small file.

        Raises:
            DataError: it cannot be read, or is larger.
        """
        ...

    def info(self, path: str) -> ObjectInfo | None:
        """Name, size and version of a file; None: there is no such file."""
        ...

    def list(self, suffix: str = "") -> Sequence[ObjectInfo]:
        """The files whose names end in `suffix`."""
        ...

    def put(self, path: str, data: bytes, *, create_only: bool = False) -> bool:
        """Write a small file: whole or not at all.

        Returns:
            Whether it was written: with `create_only`, an existing file is kept.
        """
        ...


@dataclass(frozen=True)
class LocalInfo:
    """`ObjectInfo` of a file in a folder."""

    path: str
    num_bytes: int
    etag: str | None = None


class LocalStore:
    """The files of a folder, without those of its sub-folders and without hidden ones.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises DataError where there is no such folder."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{folder}: no such folder")

    @property
    def shown(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    def get(self, path: str, start: int, stop: int, etag: str | None = None) -> bytes:
        """See `Store.get`; local files have no versions."""
        del etag
        try:
            with open_regular(self.folder / path) as file:
                file.seek(start)
                found = file.read(stop - start)
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(found) != stop - start:
            raise DataError(f"{self.folder / path}: was cut short while it was read; copy it again")
        return found

    def get_whole(self, path: str, max_bytes: int) -> tuple[bytes, str | None]:
        """See `Store.get_whole`."""
        try:
            with open_regular(self.folder / path) as file:
                found = file.read(max_bytes + 1)
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(found) > max_bytes:
            raise DataError(f"{self.folder / path}: more than {max_bytes:,} bytes; so large a file is not read")
        return found, None

    def info(self, path: str) -> LocalInfo | None:
        """Name and size of a file; None: there is no such file."""
        try:
            return LocalInfo(path, (self.folder / path).stat().st_size)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(path, error) from error

    def list(self, suffix: str = "") -> Sequence[LocalInfo]:
        """See `Store.list`. A link to nothing is a file of 0 bytes, so that it is not overlooked."""
        try:
            with os.scandir(self.folder) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(suffix) and not entry.is_dir()]
        except OSError as error:
            raise self._unreadable("", error) from error
        return [self.info(name) or LocalInfo(name, 0) for name in names if not name.startswith(".")]

    def put(self, path: str, data: bytes, *, create_only: bool = False) -> bool:
        """See `Store.put`; the file is on the disk when this returns."""
        out = self.folder / path
        new = out.with_name(f".{out.name}.{os.getpid()}.new")
        try:
            with new.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if create_only:
                os.link(new, out)
            else:
                new.replace(out)
        except FileExistsError:
            return False
        except OSError as error:
            raise DataError(f"{out}: cannot be written ({error.strerror})") from error
        finally:
            new.unlink(missing_ok=True)
        return True

    def _unreadable(self, path: str, error: OSError) -> DataError:
        return DataError(f"{self.folder / path}: cannot be read ({error.strerror})")


@contextmanager
def opened_store(place: str) -> Iterator[Store]:
    """The files of a data set, by its folder, its manifest or the URL of either.

    Raises:
        DataError: there is no such folder, or the URL is not one of a store.
    """
    place = place.rstrip("/").removesuffix(f"/{MANIFEST_NAME}") if place.strip("/") else place
    if is_url(place):
        with RemoteStore(place) as store:
            yield store
    else:
        yield LocalStore("." if place == MANIFEST_NAME else place)
