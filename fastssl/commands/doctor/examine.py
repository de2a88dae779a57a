"""Checks whether this node is ready for training. Each check gives one finding, with advice on how to fix it."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from fastssl.commands.doctor import gpu, machine, network, software, storage
from fastssl.commands.doctor.finding import Finding, Node
from fastssl.commands.output import print_json
from fastssl.config import Config

Check = Callable[[Node], Finding]

CHECKS: dict[str, Check] = {
    "python": software.check_python,
    "packages": software.check_packages,
    "ffcv": software.check_ffcv,
    "jpeg_check": software.check_jpeg_check,
    "jpeg_region": software.check_jpeg_region,
    "dali": software.check_dali,
    "apex": software.check_apex,
    "gpu": gpu.check_gpu,
    "triton": gpu.check_triton,
    "cores": machine.check_cores,
    "memory": machine.check_memory,
    "shm": machine.check_shared_memory,
    "nofile": machine.check_open_files,
    "memlock": machine.check_locked_memory,
    "data": storage.check_data,
    "run_dir": storage.check_run_dir,
    "interfaces": network.check_interfaces,
    "gloo": network.check_gloo,
    "nccl": network.check_nccl,
}


def examine(cfg: Config | None = None, data: str | Path | None = None) -> Iterator[Finding]:
    """Run the checks one after the other.

    A check that raises gives a failed finding; the libraries' output on stdout is dropped.

    Args:
        cfg: The planned run: its device, files and folder are also checked.
        data: What is measured: a folder, a .beton file, a data set of many or a URL (default: data.train of cfg).
    """
    node = Node(cfg=cfg, data=data or (cfg.data.train_paths[0] if cfg and cfg.data.train_paths else None))
    for name, check in CHECKS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            found = _examined(name, check, node)
        yield found


def doctor(cfg: Config | None, data: str | Path | None, *, as_json: bool) -> int:
    """Print the findings, one line each as they come, or all of them as JSON.

    Returns:
        Exit code: 1 if a check failed, else 0.
    """
    findings: list[Finding] = []
    if as_json:

        def find() -> list[dict[str, str]]:
            findings.extend(examine(cfg, data))
            return [found.as_dict() for found in findings]

        print_json(find)
    else:
        for found in examine(cfg, data):
            findings.append(found)
            print(found.line(), flush=True)
    return int(any(found.status == "fail" for found in findings))


def _examined(name: str, check: Check, node: Node) -> Finding:
    try:
        return check(node)._replace(check=name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding("fail", f"the check itself failed ({reason})", "fix the cause that it names", check=name)
