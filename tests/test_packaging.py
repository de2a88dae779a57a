"""The house itself: nobody else's packages, and imports that say so when they are found."""

import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.helpers.processes import ROOT


def test_requirements_name_no_stranger_and_pin_everything():
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text().splitlines():
            if not line or line.startswith(("#", "-r ")):
                continue
            name, _, version = line.partition("==")
            assert version, f"{path.name}: {line} is not pinned"
            assert name.lower() not in ("fastssl", "apex", "kernels", "pipelines")


def test_every_package_is_found_for_installation():
    folders = {path.parent for top in ("fastssl", "pipelines", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()
    found = find_packages(str(ROOT), include=["fastssl*", "pipelines*", "kernels*"])
    assert set(found) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_no_module_is_named_like_a_standard_module():
    names = {path.stem for path in (ROOT / "fastssl").iterdir() if path.name != "__pycache__"}
    assert not names & set(sys.stdlib_module_names)


def test_another_package_named_kernels_is_refused_with_both_paths(tmp_path: Path):
    stranger = tmp_path / "kernels"
    stranger.mkdir()
    (stranger / "__init__.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import fastssl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert str(stranger) in done.stderr
    assert str(ROOT / "kernels") in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["convert", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from fastssl.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "numba", "ffcv", "deepspeed", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
