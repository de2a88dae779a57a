"""Blocks of remote objects on a node's disk, shared by its processes: one file a block, and no daemon or database.

A block is written under a temporary name and renamed: what has its name is whole. Whoever finds none takes the block's
lock (flock, which the kernel lets go when a process dies), looks again, and fetches: a node fetches a block once. The
bytes that all blocks have together stand in the eviction lock's file; under this lock a block is renamed, and if it
does not fit, the least recently used ones are removed first. A reader has its block open: removing breaks none. Use is
marked by the file's modification time (many mounts do not keep the time of access).
"""

import errno
import fcntl
import hashlib
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.errors import DataError

MIN_LIMIT_BYTES = 1 << 20
_FOLDER = "fastssl-blocks"  # below the user's: nothing else is ever removed
_LOW = 0.9  # of the limit: down to this blocks are removed
_NUM_LOCKS = 1024  # files for the locks of all blocks: two blocks of one lock only wait for each other
_POLL_S = 0.01
_PAUSE_S = 5.0  # after the disk was found full
_NAME = re.compile(r"[0-9a-f]{30}")


class BlockCache:
    """Blocks by key. Safe to use from several threads and processes; a cache that fails costs time, never data."""

    def __init__(self, folder: Path, limit_bytes: int, *, max_wait_s: float = 30.0) -> None:
        """Open or create a cache; blocks of earlier runs are used.

        Args:
            folder: On a disk of this node. Blocks are kept in a folder below it.
            limit_bytes: Most bytes of all blocks together; blocks that are being written come on top.
            max_wait_s: Longest wait for another process that fetches the same block, or that removes blocks. A process
                that is stopped keeps its locks: the others then fetch for themselves.
        Raises:
            DataError: the folder cannot be written to, or the limit is too small to be of use.
        """
        if limit_bytes < MIN_LIMIT_BYTES:
            raise DataError(f"data.cache_gb: {limit_bytes:,} bytes are too few; give at least {MIN_LIMIT_BYTES:,}")
        self._folder = Path(folder) / _FOLDER
        self._limit, self._max_wait_s = limit_bytes, max_wait_s
        self.num_fetched = self.num_uncached = 0
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._in_flight: dict[str, Future[bytes]] = {}
        self._is_warned = False
        self._stuck: set[str] = set()  # locks that were waited for in vain
        self._pause_until_s = 0.0
        reason = self._create_folders()
        if reason:
            raise DataError(f"data.cache_dir: {folder}: {reason}; name a folder on a disk of this node")
        with self._held("evict") as used:
            if used is not None:
                self._evict(used, self._limit, room=0)

    def get(self, key: str, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        """A block, fetched if the node has none.

        Args:
            key: Names the object, its version and the range.
            num_bytes: Its size.
            fetch: Gets the bytes; what it raises reaches all threads that wait for this block.
        """
        name = _name_of(key)
        if (found := self._read(name, num_bytes)) is not None:
            return found
        with self._lock:
            future = self._in_flight.get(name)
            is_first = future is None
            if future is None:
                future = self._in_flight[name] = Future()
        if not is_first:
            return future.result()
        try:
            future.set_result(self._get_locked(name, num_bytes, fetch))
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._in_flight[name]
        return future.result()

    def forget(self, key: str) -> None:
        """Remove a block whose bytes turned out to be wrong."""
        with suppress(OSError):
            self._path(_name_of(key)).unlink()

    def _get_locked(self, name: str, num_bytes: int, fetch: Callable[[], bytes]) -> bytes:
        with self._held(f"block-{int(name[:8], 16) % _NUM_LOCKS}"):
            # Without the lock it is the same: two fetch the block, and each renames a whole one.
            if (found := self._read(name, num_bytes)) is not None:
                return found
            block = fetch()
            if len(block) != num_bytes:
                raise DataError(f"a block of {num_bytes:,} bytes came with {len(block):,}")
            with self._lock:
                self.num_fetched += 1
            if not self._write(name, block):
                with self._lock:
                    self.num_uncached += 1
            return block

    def _read(self, name: str, num_bytes: int) -> bytes | None:
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                block = file.read()
                with suppress(OSError):  # read-only
                    os.utime(file.fileno())
        except OSError:
            return None
        if len(block) == num_bytes:  # a machine that crashed can leave a name without its bytes
            return block
        with suppress(OSError):
            path.unlink()
        return None

    def _write(self, name: str, block: bytes) -> bool:
        """Keep a block; False: it could not be kept."""
        if len(block) > self._limit or time.monotonic() < self._pause_until_s:
            return False
        try:
            with self._temporary() as temporary:
                path, descriptor = temporary
                _write_all(descriptor, block)
                with self._held("evict") as used:
                    if used is None:
                        return False
                    self._rename(path, self._path(name), len(block), used)
            return True
        except OSError as error:
            self._give_way(error)
            return False

    def _rename(self, temporary: Path, path: Path, num_bytes: int, used: int) -> None:
        """Put a written block into its place; the eviction lock is held."""
        num_used = _read_number(used)
        if num_used is None or num_used + num_bytes > self._limit:
            num_used = self._evict(used, self._limit, room=num_bytes)
        path.parent.mkdir(exist_ok=True)
        # First the number: if the process dies in between, it is too large, and too much is removed once.
        _write_number(used, num_used + num_bytes)
        temporary.rename(path)

    def _give_way(self, error: OSError) -> None:
        """After a failed write: say so once; on a full disk, leave room to others for a while."""
        with self._lock:
            is_warned, self._is_warned = self._is_warned, True
            self._pause_until_s = time.monotonic() + _PAUSE_S
        if not is_warned:
            print(
                f"fastssl: warning: data.cache_dir: {self._folder.parent}: {os.strerror(error.errno or errno.EIO)}: "
                "blocks that find no room are fetched again when they are needed again",
                file=sys.stderr,
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError), self._held("evict") as used:
                if used is not None:
                    self._evict(used, None, room=0)

    def _evict(self, used: int, limit: int | None, *, room: int) -> int:
        """Remove the least recently used blocks until there is room, and what dead processes have left.

        Args:
            used: The eviction lock.
            limit: Most bytes; None: the disk is full, remove a tenth of what there is.
            room: Bytes that are to fit.
        Returns:
            The bytes that are left.
        """
        self._remove_leftovers()
        blocks = []
        for folder in os.scandir(self._folder / "blocks"):
            with suppress(OSError):
                for entry in os.scandir(folder):
                    if _NAME.fullmatch(entry.name):
                        with suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            blocks.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in blocks)
        if limit is None or total + room > limit:
            target = _LOW * (total if limit is None else max(limit - room, 0))
            for _, size, path in sorted(blocks):
                if total <= target:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
        with suppress(OSError):  # full; an empty file means: count
            os.ftruncate(used, 0)
            _write_number(used, total)
        return total

    def _remove_leftovers(self) -> None:
        """Temporary files whose writers are dead: these let go of their locks."""
        for entry in os.scandir(self._folder / "tmp"):
            with suppress(OSError):
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _try_lock(descriptor):
                        os.unlink(entry.path)
                finally:
                    os.close(descriptor)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[Path, int]]:
        """A new file that is locked while this process is alive, and removed if it is still there in the end."""
        while True:
            path = self._folder / "tmp" / f"{os.getpid()}-{threading.get_ident()}-{next(self._numbers)}"
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            try:
                # Else it was just taken for a leftover.
                if not _try_lock(descriptor) or os.fstat(descriptor).st_nlink == 0:
                    continue
                yield path, descriptor
                return
            finally:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                os.close(descriptor)

    @contextmanager
    def _held(self, name: str) -> Iterator[int | None]:
        """A lock's descriptor; None after too long a wait, or if there are no locks (full, read-only)."""
        try:
            descriptor = os.open(self._folder / "locks" / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except OSError:
            yield None
            return
        is_held = False
        try:
            is_held = self._acquire(descriptor, name)
            yield descriptor if is_held else None
        finally:
            if is_held:  # said, or a child that was forked meanwhile would go on holding it
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _acquire(self, descriptor: int, name: str) -> bool:
        # Who has once waited in vain does not wait as long for the next block.
        end_s = time.monotonic() + (self._max_wait_s / 100 if name in self._stuck else self._max_wait_s)
        while not _try_lock(descriptor):
            if time.monotonic() > end_s:
                self._stuck.add(name)
                return False
            time.sleep(_POLL_S)
        self._stuck.discard(name)
        return True

    def _create_folders(self) -> str | None:
        """What is wrong with the folder, or None."""
        try:
            for name in ("locks", "tmp", "blocks"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
                if not os.access(self._folder / name, os.W_OK | os.X_OK):
                    return "is not writable"
        except OSError as error:
            return os.strerror(error.errno or errno.EIO)
        return None

    def _path(self, name: str) -> Path:
        return self._folder / "blocks" / name[:2] / name[2:]


def _name_of(key: str) -> str:
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_all(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


def _read_number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.isdigit() and len(text) == 20 else None


def _write_number(descriptor: int, number: int) -> None:
    os.pwrite(descriptor, b"%020d" % number, 0)
