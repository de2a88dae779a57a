"""moto's S3 in a process of its own: the dialect, not the speed."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.helpers.processes import free_port


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server with an empty bucket named "bucket"; gives the endpoint. Skips the test without moto."""
    pytest.importorskip("moto")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end_s = time.monotonic() + 60
        while not _is_there(url):
            assert process.poll() is None, "moto has ended"
            assert time.monotonic() < end_s, "moto does not answer"
            time.sleep(0.05)
        send(f"{url}/bucket", "PUT")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def send(url: str, method: str, body: bytes = b"") -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "text/plain"}, method=method)
    urllib.request.urlopen(request, timeout=10).close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, *, key: str = "AKIAONE", secret: str = "secret-one") -> None:
    """The environment of a user of this server; empty key: no credentials in it."""
    forget(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    if key:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither variables nor files of AWS from the developer's own account."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")


def _is_there(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/moto-api/", timeout=10).close()
    except OSError:
        return False
    return True
