"""What the base image has is kept: list it, name what it lacks, and check in the end that all of it is still there."""

# usage: base_packages.py list                          the base's packages as pip constraints
#        base_packages.py missing BASE REQUIREMENTS...  the requirements that the base lacks
#        base_packages.py check BASE                    fails where a package is hidden or does not import

import importlib
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

# Not kept: the environment has its own to build with.
BUILD_TOOLS = {"pip", "setuptools", "wheel"}
# A base may hold OpenCV under any name; a second copy would hide the first.
MODULE_OF = {"opencv-python-headless": "cv2"}
IMPORTS = ("deepspeed", "ffcv.loader", "timm", "fastssl.trainer", "pipelines.loader", "kernels.augment")


def canonical(name: str) -> str:
    """The name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, Distribution]:
    """Every package that Python finds, by canonical name; the first on the path hides the others."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        if distribution.metadata["Name"]:
            found.setdefault(canonical(distribution.metadata["Name"]), distribution)
    return found


def in_base(distribution: Distribution) -> bool:
    """Whether the package lies outside this virtual environment."""
    return not Path(str(distribution.locate_file(""))).resolve().is_relative_to(Path(sys.prefix).resolve())


def base_packages() -> dict[str, str]:
    """Name and version of each package of the base image."""
    return {name: found.version for name, found in installed().items() if in_base(found) and name not in BUILD_TOOLS}


def read_pins(path: Path) -> dict[str, str]:
    """Name and version of each `name==version` line."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pins = (line.partition("==") for line in lines if line and not line.startswith(("#", "-")))
    return {canonical(name): version for name, _, version in pins}


def imports(module: str) -> bool:
    """Whether a module is there and works; opencv-python does not where the base has no libGL."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def missing(base: dict[str, str], requirements: dict[str, str]) -> dict[str, str]:
    """The requirements that the base does not meet, in any version."""
    return {
        name: version
        for name, version in requirements.items()
        if name not in base and not (name in MODULE_OF and imports(MODULE_OF[name]))
    }


def check(base: dict[str, str]) -> None:
    """Stop with one line for each package of the base that is gone or hidden; import what a run needs."""
    now = base_packages()
    changed = [f"{name} {was} -> {now.get(name, 'hidden')}" for name, was in base.items() if now.get(name) != was]
    if changed:
        sys.exit("base_packages: error: the base's packages have changed: " + ", ".join(changed))
    importlib.import_module("pipelines.torchvision_operators").declare_torchvision_operators()  # for timm
    for name in IMPORTS:
        importlib.import_module(name)
    print(f"base_packages: {len(base)} packages of the base unchanged; {', '.join(IMPORTS)} import")
    for name in ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "apex", "numpy"):
        if found := installed().get(name):
            print(f"base_packages: {name} {found.version} from {'the base' if name in base else 'requirements'}")


def show(pins: dict[str, str]) -> None:
    """Print the pins as pip reads them."""
    for name, version in sorted(pins.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    pins = [read_pins(Path(path)) for path in paths]
    if command == "list":
        show(base_packages())
    elif command == "missing":
        show(missing(pins[0], {name: version for part in pins[1:] for name, version in part.items()}))
    elif command == "check":
        check(pins[0])
