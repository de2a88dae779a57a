"""Downloads by other libraries, which set no limit to how long they wait for a server."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

MAX_SILENCE_S = 30.0  # of a server


@contextmanager
def limited_silence() -> Iterator[None]:
    """Let connections that are opened meanwhile fail after `MAX_SILENCE_S` without data."""
    before_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(MAX_SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before_s)
