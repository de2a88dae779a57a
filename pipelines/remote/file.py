"""A remote object as a file that can be read and sought, with ranges that are fetched ahead."""

import io
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from pipelines.errors import DataError
from pipelines.remote.store import ObjectInfo, RemoteError, RemoteStore

FIRST_BYTES = 64 << 10  # of the first range at a new place; each further one is twice as long
MAX_RANGE_BYTES = 4 << 20
MAX_SKIP_BYTES = 1 << 20  # what is skipped by less than this is read on
_NUM_AHEAD = 4  # ranges
_NUM_RUNS = 4  # places that are read in turns, such as the columns of a table


@dataclass
class _Run:
    """A place of the object that is read onwards: the bytes at hand, and the ranges that follow them."""

    start: int
    end: int  # of what was asked for
    range_bytes: int
    data: bytes = b""
    pending: deque[tuple[int, int, Future[bytes]]] = field(default_factory=deque)

    def cancel(self) -> None:
        for _, _, future in self.pending:
            future.cancel()
        self.pending.clear()


class RemoteFile(io.RawIOBase):
    """An object's bytes as of when its ETag was taken. Not safe to use from several threads at once.

    A connection that is cut costs the range that it served: the others stay, and this one is asked for again.
    """

    def __init__(self, store: RemoteStore, found: ObjectInfo, *, is_sparse: bool = False) -> None:
        """Open an object.

        Args:
            store: Where it is; closed with the file.
            found: The object, with the ETag that each range must have.
            is_sparse: Small pieces are read, far from each other: nothing is fetched ahead.
        """
        super().__init__()
        self._store, self._found, self._is_sparse = store, found, is_sparse
        self._max_skip_bytes = 0 if is_sparse else MAX_SKIP_BYTES
        self._at = 0
        self._runs: list[_Run] = []  # the one used last is the last

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._found.num_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"a negative position, {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read at most as many bytes as the buffer holds; 0: the end.

        Raises:
            DataError: the object has changed.
            RemoteError: a range cannot be fetched; see `RemoteStore.get`.
        """
        if self._at >= self._found.num_bytes or not len(buffer):
            return 0
        run = self._run(len(buffer))
        first = self._at - run.start
        data = memoryview(run.data)[first : first + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            for run in self._runs:
                run.cancel()
            self._store.close()
        super().close()

    def _run(self, num_bytes: int) -> _Run:
        """A run that holds the byte at the position, fetched if need be."""
        run = next((run for run in self._runs if run.start <= self._at <= run.end + self._max_skip_bytes), None)
        if run is None:
            if len(self._runs) == _NUM_RUNS:
                self._runs.pop(0).cancel()
            run = _Run(self._at, self._at, FIRST_BYTES)
        else:
            self._runs.remove(run)
        self._runs.append(run)
        if self._at >= run.start + len(run.data):
            self._advance(run, num_bytes)
        return run

    def _advance(self, run: _Run, num_bytes: int) -> None:
        while run.pending and run.pending[0][1] <= self._at:  # skipped
            run.pending.popleft()[2].cancel()
        if not run.pending:
            run.end = self._at
            self._ask(run, num_bytes)
        start, _, future = run.pending.popleft()
        if not self._is_sparse and run.range_bytes > FIRST_BYTES:  # the second range, at least: it is read onwards
            while len(run.pending) < _NUM_AHEAD and run.end < self._found.num_bytes:
                self._ask(run, 0)
        if not self._is_sparse:
            run.range_bytes = min(2 * run.range_bytes, MAX_RANGE_BYTES)
        try:
            run.start, run.data = start, future.result()
        except RemoteError as error:
            self._runs.remove(run)
            run.cancel()
            if error.status != 412:
                raise
            shown = f"{self._store.shown}/{self._found.path}"
            raise DataError(f"{shown}: changed while it was read; convert again") from None

    def _ask(self, run: _Run, num_bytes: int) -> None:
        num_bytes = min(max(num_bytes, run.range_bytes), MAX_RANGE_BYTES, self._found.num_bytes - run.end)
        future = self._store.submit(self._found.path, run.end, run.end + num_bytes, self._found.etag)
        run.pending.append((run.end, run.end + num_bytes, future))
        run.end += num_bytes
