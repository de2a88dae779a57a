"""Code blocks of a document, in a copy of the sources."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT, environment

COPIED = ("fastssl", "pipelines", "kernels", "configs", "tests/helpers")
WITHOUT = shutil.ignore_patterns("*.pyc", "*.tmp.*")  # of __pycache__ only numba's code: 10 s for each new process


def copy_sources(folder: Path) -> None:
    """The packages, their configurations, and the helpers and fixtures of the tests."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=WITHOUT)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "tests/conftest.py", folder / "tests")


def blocks(document: Path, language: str) -> list[str]:
    """The document's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def patch(path: Path, diff: str) -> None:
    """Apply the hunks of a diff, each of which fits one place of the file."""
    text = path.read_text()
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(old) == 1, f"{path}: {old}"
        text = text.replace(old, "".join(line[1:] for line in lines))
    path.write_text(text)


def run_in(copy: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, in the copy and with its packages."""
    settings = environment() | {"PYTHONPATH": str(copy), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=copy, env=settings, capture_output=True, text=True, timeout=240, check=False)
