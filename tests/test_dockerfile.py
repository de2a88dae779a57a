"""The Dockerfile without building it: `make image` builds it, which takes minutes and a base image."""

import fnmatch
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

BASE_PACKAGES = runpy.run_path(str(ROOT / "docker/base_packages.py"))
missing, read_pins = BASE_PACKAGES["missing"], BASE_PACKAGES["read_pins"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORE = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
IMAGE_FILES = ["Dockerfile", ".dockerignore", "docker/install_packages.sh", "docker/base_packages.py"]


def is_let_through(path: str) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern that matches it or a folder of it decides.

    Only the three forms that the file uses: `*`, `!name` and `**/name`.
    """
    parts = path.split("/")
    through = True
    for pattern in IGNORE:
        name = pattern.removeprefix("!")
        candidates = parts if name.startswith("**/") else parts[:1]
        if any(fnmatch.fnmatchcase(part, name.removeprefix("**/")) for part in candidates):
            through = pattern.startswith("!")
    return through


def copied_from_context() -> list[str]:
    """The sources of each COPY that reads the build's context."""
    instructions = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, flags=re.MULTILINE)
    return [source for instruction in instructions for source in instruction.split()[:-1]]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (requirements/dev.txt)")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_copied_path_exists_and_is_let_through():
    sources = copied_from_context()
    assert len(sources) >= 4
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source == "." or is_let_through(source), source


@pytest.mark.parametrize("package", ["fastssl", "pipelines", "kernels", "configs"])
def test_every_file_of_the_packages_is_let_through(package: str):
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()]
    kept = [file for file in files if is_let_through(file)]
    assert kept
    assert [file for file in files if file not in kept and "__pycache__" not in file and not file.endswith(".so")] == []


@pytest.mark.parametrize("path", ["setup.py", "pyproject.toml", "LICENSE", "scripts/demo.sh", "configs/demo.yaml"])
def test_what_the_command_and_the_installation_need_is_let_through(path: str):
    assert (ROOT / path).is_file()
    assert is_let_through(path)


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        ".venv/bin/python",
        "data/train.beton",
        "fastssl/__pycache__/cli.cpython-311.pyc",
        "pip.conf",
        "pipelines/engines/_jpeg_check.cpython-311-x86_64-linux-gnu.so",
        "pipelines/engines/_jpeg_region.cpython-311-x86_64-linux-gnu.so",
        "runs/demo/metrics.jsonl",
        "tests/conftest.py",
    ],
)
def test_what_is_large_or_private_stays_out(path: str):
    assert not is_let_through(path)


def test_the_command_is_the_demo_and_its_user_is_not_root():
    assert re.findall(r"^CMD (.+)$", DOCKERFILE, flags=re.MULTILINE) == ['["scripts/demo.sh"]']
    assert re.findall(r"^USER (.+)$", DOCKERFILE, flags=re.MULTILINE)[-1] == "10001:10001"


def test_the_base_is_an_argument_of_both_stages():
    assert "\nARG BASE=nvcr.io/nvidia/pytorch:" in DOCKERFILE
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.MULTILINE) == ["${BASE}", "${BASE}"]


@pytest.mark.parametrize("path", IMAGE_FILES)
def test_no_package_index_is_named(path: str):
    text = (ROOT / path).read_text().replace("nvcr.io/nvidia/pytorch", "")
    assert not re.search(r"https?://|\b[\w-]+\.(org|com|net|io)/", text), path


def pins(folder: Path, text: str) -> dict[str, str]:
    """The pins of a requirements file with this text."""
    path = folder / "pins.txt"
    path.write_text(text)
    return read_pins(path)


def test_pins_are_read_without_comments_options_and_spelling(tmp_path: Path):
    assert pins(tmp_path, "# a\n-r common.txt\nPyYAML==6.0.3\npytorch_pfn.extras==0.9.0\n") == {
        "pyyaml": "6.0.3",
        "pytorch-pfn-extras": "0.9.0",
    }


def test_what_the_base_has_is_not_asked_for_in_whatever_version(tmp_path: Path):
    base = pins(tmp_path, "torch==2.11.0a0+eb65b36914.nv26.2\nnumpy==2.1.0\n")
    wanted = {"torch": "2.13.0", "numpy": "2.4.6", "hjson": "3.1.0"}
    assert missing(base, wanted) == {"hjson": "3.1.0"}


def test_opencv_under_another_name_is_not_installed_twice():
    pytest.importorskip("cv2")
    assert missing({}, {"opencv-python-headless": "5.0.0.93"}) == {}
