"""The fused kernels where there is no GPU: the cases of fused_cases.py in Triton's interpreter.

Triton decides at its first import whether it interprets, for the whole process: hence another process.
"""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

CASES = "tests/kernels/similarity/fused_cases.py"


def test_cases_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--maxfail=5", CASES]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=environment() | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
