"""Test cases of Triton kernels where there is no GPU: in Triton's interpreter.

Triton decides at its first import whether it interprets, for the whole process: hence another process.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment


def run_cases(path: str, mark: str) -> None:
    """Run the cases of a file that have the mark (an expression as pytest's -m takes it); fail with its output."""
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
