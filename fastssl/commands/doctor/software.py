"""Checks of what is installed."""

import importlib
import importlib.util
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

from fastssl.commands.doctor.finding import Finding, Node
from fastssl.machine.environment import package_version
from pipelines.engines.jpeg_check import why_no_jpeg_check
from pipelines.engines.jpeg_region import why_no_region_decoder
from pipelines.errors import one_line

_REQUIRED = ("torch", "torchvision", "deepspeed", "ffcv", "numba", "numpy", "timm")
_OPTIONAL = ("triton", "nvidia-dali-cuda130")
_INSTALL = "make install, or the image of docs/docker.md"


def check_python(_: Node) -> Finding:
    """Python 3.11 or 3.12, in a virtual environment or an image."""
    found = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("fail", f"Python {found}", "use Python 3.11 or 3.12")
    return Finding("ok", f"Python {found}, {sys.executable}")


def check_packages(_: Node) -> Finding:
    """Installed versions, compared with those that were tested together (requirements/)."""
    import torch

    tried = _pins()
    shown, missing = [f"CUDA {torch.version.cuda or 'none: a CPU build of torch'}"], []
    for name in (*_REQUIRED, *_OPTIONAL):
        version = package_version(name)
        if version is None and name in _REQUIRED:
            missing.append(name)
        elif version is None:
            shown.append(f"{name} not installed")
        else:
            # A local build label, such as +cpu, does not make another version.
            is_tried = tried.get(name, version).split("+")[0] == version.split("+")[0]
            shown.append(f"{name} {version}" + ("" if is_tried else f" (tested: {tried[name]})"))
    if missing:
        return Finding("fail", f"not installed: {', '.join(missing)}; {', '.join(shown)}", _INSTALL)
    return Finding("ok", ", ".join(shown))


def check_ffcv(_: Node) -> Finding:
    """FFCV's compiled extension."""
    try:
        importlib.import_module("ffcv.libffcv")
    except (ImportError, OSError, AttributeError) as error:
        reason = one_line(error)[:200]
        return Finding(
            "fail", f"FFCV cannot be imported ({reason})", f"{_INSTALL}; scripts/install_ffcv.sh compiles it"
        )
    return Finding("ok", f"FFCV {package_version('ffcv')}, its compiled extension loads")


def check_jpeg_check(_: Node) -> Finding:
    """The compiled check of JPEGs at conversion; without it, libjpeg checks all of them."""
    reason = why_no_jpeg_check()
    if reason:
        return Finding("warn", f"JPEGs take longer to convert, with the same result: {reason}", _INSTALL)
    return Finding("ok", "JPEGs are converted without decoding them")


def check_jpeg_region(_: Node) -> Finding:
    """The compiled decoder of the part of a JPEG that the views show; without it, JPEGs are decoded in full."""
    reason = why_no_region_decoder()
    if reason:
        return Finding("warn", f"JPEGs are decoded in full, which takes longer: {reason}", _INSTALL)
    return Finding("ok", "of JPEGs, only what the views show is decoded")


def check_dali(node: Node) -> Finding:
    """DALI, and the CUDA version that it is built for; needed only by data.engine=dali."""
    wanted = node.cfg is not None and node.cfg.data.engine == "dali"
    try:
        importlib.import_module("nvidia.dali")
    except (ImportError, OSError) as error:
        reason = one_line(error)[:200]
        if wanted:
            return Finding(
                "fail", f"DALI cannot be imported ({reason})", "data.engine is dali: install the DALI of requirements/"
            )
        return Finding("skipped", f"DALI cannot be imported ({reason}); only data.engine=dali needs it")
    names = (each.metadata["Name"] or "" for each in distributions())
    package = next((name for name in names if name.lower().startswith("nvidia-dali-cuda")), "")
    built_for = re.sub(r".*cuda(\d+)\d$", r"\1", package)  # nvidia-dali-cuda130 is for CUDA 13
    detail = f"{package or 'DALI'} {package_version(package) if package else 'of the base'} imports"
    if node.num_gpus and built_for:
        import torch

        if torch.version.cuda and torch.version.cuda.split(".")[0] != built_for:
            return Finding("warn", f"{detail}; torch is for CUDA {torch.version.cuda}", "install DALI for torch's CUDA")
    return Finding("ok", detail)


def check_apex(node: Node) -> Finding:
    """NVIDIA's apex, if the run asks for it; another package of that name is not imported."""
    from fastssl.build_run import why_refused
    from fastssl.optim.nvidia_apex import why_no_apex

    refusal = why_refused(node.cfg) if node.cfg else None
    if refusal:
        return Finding("fail", refusal, "fix this, or remove the key to use torch's own")
    reason = why_no_apex()
    if reason is None:
        return Finding("ok", f"NVIDIA's apex {package_version('apex') or 'of unknown version'} imports")
    if importlib.util.find_spec("apex") is None:
        return Finding("skipped", f"{reason}; only optim.impl=apex and model.layer_norm=apex need it")
    return Finding("warn", reason, "pip uninstall apex, unless something else needs it")


def _pins() -> dict[str, str]:
    """Package name -> pinned version in requirements/*.txt of this checkout."""
    pins: dict[str, str] = {"ffcv": "1.0.2"}
    for file in sorted((Path(__file__).resolve().parents[3] / "requirements").glob("*.txt")):
        for line in file.read_text().splitlines():
            name, separator, version = line.split("#")[0].strip().partition("==")
            if separator:
                pins[name] = version
    return pins
