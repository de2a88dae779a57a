"""Debian's nginx, serving a folder on the loopback."""

import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.processes import free_port

PROGRAM = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    sendfile on;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        {more}
    }}
}}
"""


@contextmanager
def nginx(root: Path, folder: Path, more: str = "") -> Iterator[str]:
    """Serve a folder, with nginx's files in another; gives the URL. Skips the test where there is no nginx.

    Args:
        root: What is served.
        folder: For its configuration and logs.
        more: Lines of the configuration's server.
    """
    if PROGRAM is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    folder.mkdir(exist_ok=True)
    for path in (*folder.parents, *root.parents, root):  # its workers are another user
        if path.owner() == Path.home().owner() and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, root=root, port=port, more=more))
    process = subprocess.Popen([PROGRAM, "-e", str(folder / "error.log"), "-c", str(config), "-p", str(folder)])
    try:
        _wait(f"http://127.0.0.1:{port}/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + 10
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, "nginx has ended"
            assert time.monotonic() < end_s, "nginx does not answer"
            time.sleep(0.02)
