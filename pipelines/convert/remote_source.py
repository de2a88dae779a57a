"""Files of a source in object storage or on a web server, by URL; local ones are opened as they are."""

import io
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar
from urllib.parse import unquote

from pipelines.errors import DataError
from pipelines.files import open_regular
from pipelines.remote import ObjectInfo, RemoteError, RemoteStore
from pipelines.remote.file import RemoteFile

NUM_THREADS = 8  # that ask for sizes or headers at once

_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteObject:
    """An object to read; as text, its URL without secrets.

    Attributes:
        folder: URL of a store.
        path: The object's path there.
        num_bytes: Its size when it was found.
        etag: Its version; None: the server has none.
        shown: Its URL, without user, password and query.
    """

    folder: str = field(repr=False)
    path: str
    num_bytes: int
    etag: str | None
    shown: str

    def __str__(self) -> str:
        return self.shown


SourcePath: TypeAlias = str | RemoteObject  # a local path, or an object


def open_source(path: SourcePath, *, is_sparse: bool = False) -> io.BufferedReader:
    """Open a file of a source for reading and seeking.

    Args:
        path: The file.
        is_sparse: See `RemoteFile`.
    Raises:
        OSError: see `open_regular`.
        DataError: an object that cannot be read, or has changed; also while it is read.
    """
    if isinstance(path, str):
        return open_regular(path)
    store = RemoteStore(path.folder, num_threads=NUM_THREADS)
    return io.BufferedReader(
        RemoteFile(store, ObjectInfo(path.path, path.num_bytes, path.etag), is_sparse=is_sparse), 32 << 10
    )


def size_of(path: SourcePath) -> int:
    """Number of bytes of a file."""
    return os.path.getsize(path) if isinstance(path, str) else path.num_bytes


def name_of(path: SourcePath) -> str:
    """The absolute path of a file, or its URL without secrets."""
    return os.path.abspath(path) if isinstance(path, str) else path.shown


def shown_url(url: str) -> str:
    """A URL as messages show it.

    Raises:
        RemoteError: it cannot be used.
    """
    root, tail = _split(url)
    with RemoteStore(root) as store:
        return f"{store.shown}/{tail}" if tail else store.shown


def find_objects(
    url: str, suffixes: tuple[str, ...], expand: Callable[[str], list[str] | None]
) -> tuple[list[RemoteObject], list[str]]:
    """Find objects by prefix, URL, glob pattern (in object storage), or numbered brace pattern.

    Args:
        url: What to find. A pattern's `*`, `?` and `[...]` do not match a slash.
        suffixes: Suffixes of the objects to use below a prefix, and not deeper.
        expand: Gives the names that a brace pattern stands for; None: it is another name.
    Returns:
        The objects, by name; and the names of others directly below a prefix.
    Raises:
        RemoteError: no access, or a web server without a list of its files.
        DataError: no objects found, or one of a brace range is missing.
    """
    root, tail = _split(url)
    with RemoteStore(root) as store:
        names = expand(tail)
        if names is not None or (tail and not _special(url).search(tail)):
            infos = map_threads(lambda name: (name, store.info(name)), names or [tail])
            missing = next((name for name, info in infos if info is None), None)
            if missing is None:
                return [_object(root, store, info) for _, info in infos if info is not None], []
            if names is not None or _is_web(url):
                raise DataError(f"{store.shown}/{missing}: no such file")
        elif tail:
            found = [info for info in store.list() if _matches(info.path, tail)]
            if not found:
                raise DataError(f"{store.shown}/{tail}: no such files")
            return [_object(root, store, info) for info in found], []
    prefix = f"{root}/{tail}" if tail else root
    with RemoteStore(prefix) as store:
        below = store.list()
        found = [info for info in below if info.path.endswith(suffixes) and "/" not in info.path]
        if not found:
            raise DataError(f"{store.shown}: no such files (a prefix is searched for {' '.join(suffixes)})")
        others = {info.path.partition("/")[0] for info in below} - {info.path for info in found}
        return [_object(prefix, store, info) for info in found], sorted(others - {""})


def map_threads(function: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
    """Call a function that mostly waits for a server for each name, several at once."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(function, names))


def _object(folder: str, store: RemoteStore, info: ObjectInfo) -> RemoteObject:
    return RemoteObject(folder, info.path, info.num_bytes, info.etag, f"{store.shown}/{info.path}")


def _split(url: str) -> tuple[str, str]:
    """URL of the folder above the first pattern or, without one, above the last name; and the path in it.

    Raises:
        RemoteError: no such URL.
    """
    scheme, _, rest = url.partition("://")
    query = ""
    if _is_web(url):
        rest, mark, query = rest.partition("?")
        query = mark + query
    host, _, path = rest.partition("/")
    folders = path.split("/")
    num = next((i for i, name in enumerate(folders) if _special(url).search(name)), len(folders) - 1)
    root = "/".join([f"{scheme}://{host}", *folders[:num]]) + query
    tail = unquote("/".join(folders[num:]))
    if any(unquote(name) in (".", "..") for name in folders):
        raise RemoteError(f"{scheme}://…: not a name of an object")
    return root, tail


def _is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _special(url: str) -> re.Pattern[str]:
    """What makes a name a pattern: a web server has no lists to match with, and `?` begins a query."""
    return re.compile(r"\{" if _is_web(url) else r"[*?\[{]")


def _matches(path: str, pattern: str) -> bool:
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))
