"""Starting this project's programs as a user would."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The environment of a user who called the virtual environment's programs."""
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
