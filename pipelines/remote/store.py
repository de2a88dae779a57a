"""Objects of a bucket or a web server through obstore, with retries that are counted and messages without secrets.

obstore retries by itself, but does not count, and puts the whole URL, user and query included, into its messages. So
its retries are off, and of its messages only the status is used. Its calls release the GIL. A process that has used it
must not be forked: the child's first call never returns. It is imported when the first object is asked for.
"""

import os
import random
import re
import threading
import uuid
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from pipelines.errors import DataError
from pipelines.remote import credentials
from pipelines.remote.failures import EXISTS, REASONS, TOO_SHORT, Failure, failure_of

T = TypeVar("T")

_AZURE = ("az", "adl", "azure", "abfs", "abfss")
_SCHEMES = ("s3", "s3a", "gs", *_AZURE, "http", "https", "file")
_STREAM_BYTES = 8 << 20
_STREAM_AHEAD = 4
_SINGLE_PUT_BYTES = 64 << 20  # larger ones are uploaded in parts
_PART_BYTES = 16 << 20  # of at most 10,000: objects of up to 160 GB
_PARTS_AT_ONCE = 4
_MAX_WAIT_S = 30.0

_CLOSED = "closed"

_user_pid: int | None = None  # the process that has used obstore


class RemoteError(DataError):
    """An object that cannot be read or written; one line that names it, without user, password, query or keys.

    Attributes:
        status: Of the server's answer, such as 412 where the object has changed; 0: there was none.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ObjectInfo:
    """An object: its path under the store's URL, its size, and what the server calls its version."""

    path: str
    num_bytes: int
    etag: str | None


def is_url(text: str | Path) -> bool:
    """Whether a user means a URL, such as s3://bucket/prefix or https://host/folder, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(text)) is not None


def why_not_to_write_down(text: str) -> str | None:
    """Why a URL must not stand in a file that others read, in words without anything secret; None: it may.

    Args:
        text: A URL, or a path.
    """
    if not is_url(text):
        return None
    parts = _split(text)
    scheme = text.partition("://")[0].lower()
    # Where a URL ends its host is a matter of opinion if a password has special characters: no @ at all but Azure's.
    has_user = "@" in text if parts is None or scheme not in _AZURE else parts.password is not None
    if not has_user and (parts is None or not parts.query):
        return None
    return (
        f"{scheme}://…: the run's folder keeps this URL, so it must not hold a user, a password or a query: name and "
        "password of a web server belong into ~/.netrc, keys and tokens of object storage into the environment"
    )


class RemoteStore:
    """The objects under a URL. Safe to use from several threads; a context manager.

    Credentials come from the environment as the providers' own clients read it, see `credentials`. If a server says
    that they are not valid (any more) and there are new ones, they are taken.
    """

    def __init__(
        self,
        url: str,
        *,
        num_threads: int = 16,
        max_tries: int = 6,
        connect_s: float = 10.0,
        silence_s: float = 20.0,
        request_s: float = 300.0,
        first_wait_s: float = 0.5,
    ) -> None:
        """Open a prefix; nothing is sent yet.

        Args:
            url: s3://, gs://, az:// or abfss://, http(s)://, file:///, with a folder that holds the objects.
            num_threads: Largest number of requests at a time by `submit` and `stream`.
            max_tries: For one range, with waits of `first_wait_s`, twice that, and so on up to 30 s between them.
            connect_s: Longest wait for a connection.
            silence_s: Longest wait for the next byte of an answer.
            request_s: Longest time of one request.
            first_wait_s: Before the second try; 1 s if the server says that it is too busy.
        Raises:
            RemoteError: not a URL of these kinds, or it holds what belongs into the environment.
        """
        self._parts = _checked(url)
        self.shown = _shown(self._parts)
        self._options: dict[str, Any] = {"connect_timeout": _duration(connect_s), "timeout": _duration(request_s)}
        self._silence_s, self._request_s, self._first_wait_s = silence_s, request_s, first_wait_s
        self._max_tries = max_tries
        self.retries: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="fastssl-remote")
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._stores: dict[str, Any] = {}
        self._credentials: tuple[object, ...] = ()
        self._num_renewals = 0

    def __repr__(self) -> str:
        return f"RemoteStore({self.shown!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has not begun, and let what waits for its next try fail. Does not wait for open requests."""
        self._is_over.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def get(self, path: str, start: int, stop: int, etag: str | None = None) -> bytes:
        """Bytes start..stop-1 of an object.

        Args:
            path: The object's path under the store's URL.
            start: First byte.
            stop: One after the last byte.
            etag: The ETag that the object must still have; None: any.
        Raises:
            RemoteError: the object is missing, changed, forbidden or too short, or every try has failed.
        """
        if stop <= start:
            return b""
        options: dict[str, Any] = {"range": (start, stop)}
        if etag and not etag.startswith("W/"):  # servers hold a weak one for different from itself
            options["if_match"] = etag

        def action(store: Any) -> bytes | Failure:
            result = store.get(self._path(path), options=options)
            if etag and not _is_same(etag, result.meta["e_tag"]):
                return Failure(REASONS[412], status=412)
            piece = result.bytes().to_bytes()
            return piece if len(piece) == stop - start else Failure(TOO_SHORT)

        return self._call(path, action)

    def submit(self, path: str, start: int, stop: int, etag: str | None = None) -> Future[bytes]:
        """`get` in a thread of the store. All who wait for the result get the same error."""
        return self._submit(self.get, path, start, stop, etag)

    def get_whole(self, path: str, max_bytes: int) -> tuple[bytes, str | None]:
        """A small object and its ETag.

        Raises:
            RemoteError: as `get`; or it has more than `max_bytes` bytes.
        """

        def action(store: Any) -> tuple[bytes, str | None] | Failure:
            result = store.get(self._path(path))
            num_bytes = result.meta["size"]
            if num_bytes > max_bytes:
                return Failure(f"has {num_bytes:,} bytes, and at most {max_bytes:,} are read")
            content = result.bytes().to_bytes()
            if len(content) != num_bytes:
                return Failure("cut short", is_final=False)
            return content, result.meta["e_tag"]

        return self._call(path, action)

    def info(self, path: str) -> ObjectInfo | None:
        """Size and ETag; None: there is no such object.

        Raises:
            RemoteError: as `get`.
        """

        def action(store: Any) -> ObjectInfo | Failure | None:
            found = store.head(self._path(path))
            return ObjectInfo(path, found["size"], found["e_tag"])

        return self._call(path, action, otherwise={404: None})

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        """All objects under the URL, also in folders, whose path ends so; sorted by path.

        Raises:
            RemoteError: as `get`; or the server cannot list (web servers without WebDAV).
        """
        skipped = len(self._path(""))

        def action(store: Any) -> list[ObjectInfo]:
            pages = store.list(self._path("") or None, chunk_size=1000)
            return [
                ObjectInfo(entry["path"][skipped:], entry["size"], entry["e_tag"])
                for page in pages
                for entry in page
                if entry["path"].endswith(suffix)
            ]

        return sorted(
            self._call("", action, is_list=self._parts.scheme.startswith("http")), key=lambda found: found.path
        )

    def put(self, path: str, data: bytes | Path, *, create_only: bool = False) -> bool:
        """Write an object. Nobody sees a part of it.

        Args:
            path: Its path under the store's URL.
            data: Its bytes, or a local file.
            create_only: Leave an object that exists as it is.
        Returns:
            False: it exists already (`create_only`), with other content if a try of this call had no answer.
        Raises:
            RemoteError: as `get`; or the server cannot write.
            OSError: the local file cannot be read.
        """
        num_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        if num_bytes > _SINGLE_PUT_BYTES and self._parts.scheme not in ("http", "https"):
            return self._put_parts(path, data, create_only=create_only)
        content = data.read_bytes() if isinstance(data, Path) else data
        mode = "create" if create_only else "overwrite"

        def action(store: Any) -> bool:
            store.put(self._path(path), content, mode=mode, use_multipart=False)
            return True

        return self._create(path, data, action)

    def holds(self, path: str, data: bytes | Path) -> bool:
        """Whether an object has this content: bytes, or those of a local file.

        Raises:
            RemoteError: as `get`.
            OSError: the local file cannot be read.
        """
        if isinstance(data, Path):
            with data.open("rb") as file:
                return all(file.read(len(piece)) == piece for piece in self.stream(path)) and not file.read(1)
        position = 0
        for piece in self.stream(path):
            if data[position : position + len(piece)] != piece:
                return False
            position += len(piece)
        return position == len(data)

    def remove(self, path: str) -> None:
        """Remove an object, if there is one of this name.

        Raises:
            RemoteError: as `get`; or it must not be removed.
        """

        def action(store: Any) -> None:
            store.delete(self._path(path))

        self._call(path, action, kind="write", otherwise={404: None})

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """A whole object from byte `start` on, in pieces, fetched ahead by the store's threads.

        Each piece is a range of the object as it was at the start (If-Match): a cut connection costs one piece.

        Raises:
            RemoteError: as `get`; while iterating.
        """
        found = self.info(path)
        if found is None:
            raise RemoteError(f"{self._shown_path(path)}: {REASONS[404]}")
        starts = iter(range(start, found.num_bytes, _STREAM_BYTES))
        pending: deque[Future[bytes]] = deque()
        try:
            while True:
                while len(pending) < _STREAM_AHEAD and (first := next(starts, None)) is not None:
                    stop = min(first + _STREAM_BYTES, found.num_bytes)
                    pending.append(self.submit(path, first, stop, found.etag))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def _put_parts(self, path: str, data: bytes | Path, *, create_only: bool) -> bool:
        """Upload in parts. To create only, upload under another name and copy where nothing is: parts know no mode."""
        if create_only and self.info(path) is not None:
            return False
        target = f"{path}.{uuid.uuid4().hex[:12]}.part" if create_only else path

        def upload(store: Any) -> bool:
            options = {"chunk_size": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE, "use_multipart": True}
            store.put(self._path(target), data, **options)
            return True

        if not create_only:
            return self._call(path, upload, kind="parts")

        def create(store: Any) -> bool:
            store.copy(self._path(target), self._path(path), overwrite=False)
            return True

        try:
            self._call(path, upload, kind="parts")
            return self._create(path, data, create)
        finally:
            with suppress(RemoteError):
                self.remove(target)

    def _create(self, path: str, data: bytes | Path, action: Callable[[Any], bool]) -> bool:
        before = self.retries.total()
        created = self._call(path, action, kind="write", otherwise={EXISTS: False, 412: False})
        # If an answer was lost, what exists may be our own.
        return created or (self.retries.total() > before and self.holds(path, data))

    def _submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        is_over = self._is_over.is_set()
        if not is_over:
            try:
                return self._threads.submit(function, *arguments)
            except RuntimeError:  # closed meanwhile, or the interpreter ends
                pass
        raise RemoteError(f"{self.shown}: {_CLOSED}")

    def _call(
        self,
        path: str,
        action: Callable[[Any], T | Failure],
        *,
        kind: str = "read",
        otherwise: dict[int, T] | None = None,
        is_list: bool = False,
    ) -> T:
        """Do something with the store until it is done, or of no use.

        Errors are raised outside of `except`: a chained one would hold obstore's message.

        Args:
            path: The object, for messages.
            action: Gets obstore's store; returns a failure that obstore does not see.
            kind: "read", "write" or "parts", see `_open`.
            otherwise: What to return at a status rather than to fail.
            is_list: Of a web server, most of which have no lists.
        """
        num_tries = 0
        is_renewed = False
        while True:
            store, num_renewals = self._open(kind)
            result = self._try(action, store)
            if not isinstance(result, Failure):
                return result
            if otherwise is not None and result.status in otherwise:
                return otherwise[result.status]
            if not is_renewed and self._renew(result, num_renewals):
                is_renewed = True
                continue
            num_tries += 1
            reason, has_no_lists = result.reason, is_list and result.status in (400, 404, 405, 501)
            if has_no_lists:
                reason = "the server has no list of its files (no WebDAV): name each file"
            if result.is_final or has_no_lists:
                raise RemoteError(f"{self._shown_path(path)}: {reason}", result.status)
            if num_tries >= self._max_tries:
                raise RemoteError(f"{self._shown_path(path)}: {reason}, {num_tries} tries", result.status)
            self._count(reason)
            if self._is_over.wait(self._wait_s(result, num_tries)):
                raise RemoteError(f"{self._shown_path(path)}: {_CLOSED}")

    def _try(self, action: Callable[[Any], T | Failure], store: Any) -> T | Failure:
        from obstore.exceptions import BaseError

        try:
            return action(store)
        except (BaseError, OSError, ValueError, NotImplementedError) as error:
            return failure_of(error, is_local=self._parts.scheme == "file")

    def _wait_s(self, failure: Failure, num_tries: int) -> float:
        """Before the next try: twice as long each time, and with jitter, or all processes would come back at once.

        Retry-After: obstore's errors hold the status and the text of an answer, but none of its headers. So a server's
        wish is known only where it repeats it in the text; else 429 and 503 wait at least 1, 2, 4, ... seconds.
        """
        if failure.asked_wait_s:
            return failure.asked_wait_s + random.uniform(0, 1)
        if failure.status in (429, 503):
            return random.uniform(1, 1.5) * min(2 ** (num_tries - 1), _MAX_WAIT_S)
        return random.uniform(0.5, 1) * min(self._first_wait_s * 2 ** (num_tries - 1), _MAX_WAIT_S)

    def _count(self, reason: str) -> None:
        with self._lock:
            self.retries[reason] += 1

    def _renew(self, failure: Failure, num_renewals: int) -> bool:
        """Take new credentials after a failure, if there are any; whether to try again at once."""
        if not failure.has_ended and failure.status not in (400, 401, 403):
            return False
        with self._lock:
            if self._num_renewals == num_renewals:  # else another thread has done it
                if not failure.has_ended and credentials.snapshot() == self._credentials:
                    return False
                self._stores.clear()
                self._num_renewals += 1
                self.retries["new credentials"] += 1
            return True

    def _open(self, kind: str) -> tuple[Any, int]:
        """obstore's store for reading, for writing, or for writing in parts; opened when first needed."""
        global _user_pid
        with self._lock:
            if kind not in self._stores:
                if _user_pid is None:
                    _user_pid = os.getpid()
                if _user_pid != os.getpid():
                    raise RuntimeError("remote objects were read before this process was forked: it cannot read any")
                self._credentials = credentials.snapshot()
                options = credentials.profile_options() if self._parts.scheme in ("s3", "s3a") else {}
                self._stores[kind] = self._new_store(kind, options)
            return self._stores[kind], self._num_renewals

    def _new_store(self, kind: str, keys: dict[str, str]) -> Any:
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore, from_url

        scheme = self._parts.scheme
        if scheme == "file":
            return LocalStore()
        options = dict(self._options)
        # While a request is sent no byte of the answer comes, however well it goes.
        options["read_timeout"] = _duration(self._silence_s if kind == "read" else self._request_s)
        if scheme == "http" or credentials.uses_plain_http():
            options["allow_http"] = True
        parts = self._parts
        if scheme in ("http", "https"):
            if (user := self._web_user()) is not None:
                encoded = b64encode(":".join(user).encode()).decode()
                options["default_headers"] = {"authorization": f"Basic {encoded}"}
            parts = parts._replace(netloc=_host(parts))
        config: dict[str, Any] = {"config": keys} if keys else {}
        if scheme in ("s3", "s3a") and not os.environ.get("AWS_COPY_IF_NOT_EXISTS"):
            config["copy_if_not_exists"] = "multipart"
        # Of an upload in parts only obstore can send one part again.
        retry = {"max_retries": self._max_tries - 1 if kind == "parts" else 0, "retry_timeout": timedelta(minutes=4)}
        with suppress(BaseError, OSError, ValueError):
            return from_url(parts.geturl(), client_options=options, retry_config=retry, **config)  # type: ignore
        raise RemoteError(f"{self.shown}: cannot be opened: check the URL, and the credentials in the environment")

    def _web_user(self) -> tuple[str, str] | None:
        """Name and password for a web server: those of the URL, else those of ~/.netrc."""
        if self._parts.username is not None:
            return unquote(self._parts.username), unquote(self._parts.password or "")
        return credentials.web_user(self._parts.hostname or "")

    def _path(self, path: str) -> str:
        """The path that obstore's store knows: of a local file, from the root."""
        return f"{unquote(self._parts.path).strip('/')}/{path}" if self._parts.scheme == "file" else path

    def _shown_path(self, path: str) -> str:
        return f"{self.shown}/{path}" if path else self.shown


def _checked(url: str) -> SplitResult:
    """The parts of a URL that can be shown without its secrets.

    Raises:
        RemoteError: it cannot be used; the message holds no more than its scheme.
    """
    scheme = url.partition("://")[0].lower()
    if not is_url(url) or scheme not in _SCHEMES:
        kind = f"{scheme}://" if is_url(url) else "a path"
        raise RemoteError(f"{kind} is no address of remote objects; these are: {', '.join(_SCHEMES)}")
    parts = _split(url)
    if parts is None or (not parts.hostname and scheme != "file"):
        raise RemoteError(f"{scheme}://…: not a URL; write special characters of a password as %XX")
    if "@" in parts.path + parts.query + parts.fragment or parts.fragment:
        raise RemoteError(f"{scheme}://…: write @ as %40 and # as %23 in a URL")
    if scheme not in ("http", "https"):
        if parts.password is not None or (parts.username is not None and scheme not in _AZURE):
            raise RemoteError(f"{scheme}://…: keys belong into the environment, not into the URL")
        if parts.query:
            raise RemoteError(f"{scheme}://…: a query is not used; keys and tokens belong into the environment")
    return parts


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
    except ValueError:
        return None
    return parts._replace(path=parts.path.rstrip("/"))


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _shown(parts: SplitResult) -> str:
    container = f"{parts.username}@" if parts.scheme in _AZURE and parts.username else ""
    return f"{parts.scheme}://{container}{_host(parts)}{parts.path}"


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _is_same(etag: str, other: str | None) -> bool:
    return other is None or etag.removeprefix("W/").strip('"') == other.removeprefix("W/").strip('"')
