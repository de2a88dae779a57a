"""Test cases of Triton kernels without a GPU, in Triton's interpreter.

Triton selects its interpreter at its first import, for the whole process. The cases therefore run in another process.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment


def run_cases(path: str, mark: str) -> None:
    """Run the cases of a file that match the mark (an expression for pytest's -m); on failure, report the output."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--maxfail=5", "-m", mark, path]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=environment() | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
