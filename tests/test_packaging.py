"""The house itself: nobody else's packages, and imports that say so when they are found."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import PathDistribution as metadata_of
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
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


def install_copy(source: Path, target: Path, **variables: str) -> None:
    """Let pip install a copy of the checkout, without what it depends on; nothing is compiled in the copy yet."""
    source.mkdir(exist_ok=True)
    for name in ("fastssl", "pipelines", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
    ]
    environment = os.environ | variables
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that pip has installed a copy of the checkout to."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    install_copy(source, target)
    return target


def test_an_installed_copy_is_whole(installed: Path, tmp_path: Path) -> None:
    code = "import fastssl, fastssl.cli; fastssl.Trainer, fastssl.load_encoder; print(fastssl.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(installed / "fastssl/__init__.py")
    assert {path.name for path in (installed / "fastssl/report").glob("page.*")} >= {"page.html", "page.css", "page.js"}
    converted = run([installed / "bin/fastssl", "convert", "--from", "digits", "digits.beton", "--split", "test"])
    assert converted.returncode == 0, converted.stderr
    assert "500 images" in converted.stdout


@pytest.mark.parametrize(
    ("name", "reason"), [("jpeg_check", "why_no_jpeg_check"), ("jpeg_region", "why_no_region_decoder")]
)
def test_an_installed_copy_has_its_compiled_libraries(installed: Path, tmp_path: Path, name: str, reason: str) -> None:
    code = f"from pipelines.engines.{name} import *; print(SOURCE, {reason}())"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(installed / f"pipelines/engines/{name}.c"), "None"], done.stderr


def test_without_a_compiler_the_installation_leaves_them_out(tmp_path: Path) -> None:
    """And JPEGs are decoded in full, and checked by libjpeg."""
    install_copy(tmp_path / "source", tmp_path / "installed", CC="/bin/false")
    folder = tmp_path / "installed/pipelines/engines"
    assert {path.name for path in folder.glob("*.c")} == {"jpeg_check.c", "jpeg_region.c"}
    assert list(folder.glob("*.so")) == []
    code = (
        "from pipelines.engines.jpeg_check import why_no_jpeg_check\n"
        "from pipelines.engines.jpeg_region import why_no_region_decoder\n"
        "print(why_no_jpeg_check(), why_no_region_decoder())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count("not compiled") == 2, done.stderr


def test_its_ranges_admit_the_pinned_versions(installed: Path) -> None:
    (metadata,) = (metadata_of(path) for path in installed.glob("fastssl-*.dist-info"))
    ranges = [Requirement(line) for line in metadata.requires or ()]
    pinned: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in re.findall(r"^([\w.-]+)(?:\[\w+\])?==([\w.]+)", path.read_text(), flags=re.MULTILINE):
            pinned.setdefault(canonicalize_name(name), set()).add(version)
    of_ffcv = {"opencv-python-headless", "pytorch-pfn-extras"}
    assert {canonicalize_name(wanted.name) for wanted in ranges} == pinned.keys() - of_ffcv
    for wanted in ranges:
        assert all(version in wanted.specifier for version in pinned[canonicalize_name(wanted.name)]), wanted


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
