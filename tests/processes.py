"""Starting this project's programs as a user would."""

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The environment of a user who called the virtual environment's programs."""
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}


def free_port() -> str:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
