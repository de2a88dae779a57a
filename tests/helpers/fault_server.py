"""A web server on the loopback that serves files and fails as it is told: by a plan for a path, or by a seed."""

import random
import re
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

FAULTS = (
    "cut",  # the connection ends in the middle of the body
    "silence",  # no answer, the connection stays open
    "stall",  # the head and half the body, then silence
    "slow",  # the body at 1 kB/s
    "flip",  # the first byte is wrong
    "short",  # a range with fewer bytes than asked for, said so
    "whole",  # the range is ignored: 200
    "changed",  # from now on the file has another ETag
)  # or a status, such as "429"
STATUS_BODIES = {
    "403": b"<Error><Code>AccessDenied</Code><Resource>secret-of-the-server</Resource></Error>",
    "403-expired": b"<Error><Code>ExpiredToken</Code><Token-0>secret-of-the-server</Token-0></Error>",
    "400-expired": b"<Error><Code>ExpiredToken</Code><Token-0>secret-of-the-server</Token-0></Error>",
    "429-in-text": b'{"error": "busy", "retry_after": 2}',
}


@dataclass(frozen=True)
class Request:
    """What came in, and what was done: "ok", a fault or a status."""

    time_s: float
    method: str
    path: str
    range: str | None
    if_match: str | None
    authorization: str | None
    outcome: str


class FaultServer:
    """A context manager; `url` is its address, with the files right below."""

    def __init__(
        self,
        files: Mapping[str, bytes] | Path,
        *,
        seed: int | None = None,
        share: float = 0.2,
        kinds: tuple[str, ...] = ("cut", "429", "500", "503"),
        max_in_a_row: int = 3,
        user: str | None = None,
    ) -> None:
        """Choose what is served.

        Args:
            files: Contents by path, or a folder.
            seed: Fail at random, the same way each time for the same requests; None: only as planned.
            share: Of the requests that fail.
            kinds: The random faults.
            max_in_a_row: Most of them for the same range of a file before it is served.
            user: "name:password" that is asked for.
        """
        self.files = files if isinstance(files, Path) else dict(files)
        self.requests: list[Request] = []
        self.body_delay_s = 0.0  # before a body that is sent here (PUT) is read
        self._seed, self._share, self._kinds, self._max_in_a_row = seed, share, kinds, max_in_a_row
        self._user = user
        self._plans: defaultdict[str, deque[str]] = defaultdict(deque)
        self._always: dict[str, str] = {}
        self._versions: Counter[str] = Counter()
        self._num_seen: Counter[tuple[str, str | None]] = Counter()
        self._num_in_a_row: Counter[tuple[str, str | None]] = Counter()
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def plan(self, path: str, *faults: str) -> None:
        """The next answers for a path fail like this, one after the other; "ok" is no fault."""
        self._plans[path].extend(faults)

    def always(self, path: str, fault: str) -> None:
        """All answers for a path fail like this, after what is planned."""
        self._always[path] = fault

    def num_requests(self, path: str, method: str | None = None) -> int:
        return sum(request.path == path and method in (None, request.method) for request in self.requests)

    def etag(self, path: str) -> str | None:
        found = self.size(path)
        return None if found is None else f'"{zlib.crc32(path.encode()):08x}-{found}-{self._versions[path]}"'

    def size(self, path: str) -> int | None:
        if isinstance(self.files, Path):
            file = self.files / path
            return file.stat().st_size if file.is_file() else None
        return len(self.files[path]) if path in self.files else None

    def part(self, path: str, start: int, stop: int) -> bytes:
        if isinstance(self.files, Path):
            with (self.files / path).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        return self.files[path][start:stop]

    def next_fault(self, path: str, asked: str | None) -> str:
        with self._lock:
            if self._plans[path]:
                fault = self._plans[path].popleft()
            elif path in self._always:
                fault = self._always[path]
            else:
                fault = self._random_fault(path, asked)
            if fault == "changed":
                self._versions[path] += 1
            return fault

    def _random_fault(self, path: str, asked: str | None) -> str:
        key = (path, asked)
        self._num_seen[key] += 1
        chance = random.Random(f"{self._seed} {path} {asked} {self._num_seen[key]}")
        is_fault = self._seed is not None and chance.random() < self._share
        if not is_fault or self._num_in_a_row[key] >= self._max_in_a_row:
            self._num_in_a_row[key] = 0
            return "ok"
        self._num_in_a_row[key] += 1
        return chance.choice(self._kinds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultServer

    def do_GET(self) -> None:
        self.serve(with_body=True)

    def do_HEAD(self) -> None:
        self.serve(with_body=False)

    def do_PUT(self) -> None:
        path, fault = self.begin()
        time.sleep(self.owner.body_delay_s)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if fault[:3].isdigit():
            return self.status(fault)
        assert isinstance(self.owner.files, dict)
        self.owner.files[path] = body
        if fault in ("silence", "cut"):  # written, and the client does not learn of it
            return self.cut() if fault == "cut" else self.wait()
        return self.send_head(201, 0, ETag=self.owner.etag(path) or "")

    def do_PROPFIND(self) -> None:
        self.begin()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.status("405")

    def begin(self) -> tuple[str, str]:
        path = unquote(urlsplit(self.path).path).strip("/")
        headers = self.headers
        fault = self.owner.next_fault(path, headers.get("Range"))
        seen = (headers.get("Range"), headers.get("If-Match"), headers.get("Authorization"))
        self.owner.requests.append(Request(time.monotonic(), str(self.command), path, *seen, fault))
        return path, fault

    def serve(self, *, with_body: bool) -> None:
        path, fault = self.begin()
        owner = self.owner
        if owner._user is not None:
            from base64 import b64encode

            if self.headers.get("Authorization") != f"Basic {b64encode(owner._user.encode()).decode()}":
                return self.status("401")
        size, etag = owner.size(path), owner.etag(path)
        if fault == "silence":
            return self.wait()
        if fault[:3].isdigit():
            return self.status(fault)
        if size is None or etag is None:
            return self.status("404")
        if self.headers.get("If-Match") not in (None, "*", etag):
            return self.status("412")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, stop = 0, size
        if asked and fault != "whole":
            start, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            if start >= size:
                return self.status("416")
            stop -= (stop - start) // 2 if fault == "short" else 0
            self.send_head(206, stop - start, ETag=etag, Content_Range=f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_head(200, size, ETag=etag)
        return self.send_body(owner.part(path, start, stop), fault) if with_body else None

    def send_body(self, body: bytes, fault: str) -> None:
        half = len(body) // 2
        if fault in ("cut", "stall"):
            self.wfile.write(body[:half])
            return self.cut() if fault == "cut" else self.wait()
        if fault == "slow":
            for first in range(0, len(body), 200):
                self.wfile.write(body[first : first + 200])
                if self.owner._is_over.wait(0.2):
                    return None
            return None
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.wfile.write(body)
        return None

    def status(self, fault: str) -> None:
        body = STATUS_BODIES.get(fault, b"")
        more = {"Retry_After": "1"} if fault[:3] in ("429", "503") else {}
        if fault[0] == "3":
            more["Location"] = "/elsewhere"
        self.send_head(int(fault[:3]), len(body), **more)
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_head(self, status: int, num_bytes: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(num_bytes))
        self.end_headers()

    def cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def wait(self) -> None:
        self.wfile.flush()
        self.owner._is_over.wait(60)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
