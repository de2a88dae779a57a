"""Checks of what the processes of a run talk through."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from fastssl.doctor.finding import Finding, Node

_TIMEOUT_S = 180  # two processes import torch, on a busy machine too
_MAX_RANKS = 8


def check_interfaces(_: Node) -> Finding:
    """This host's name and its network interfaces, and those that the environment names."""
    addresses = {
        name: [each.address for each in found if each.family == socket.AF_INET]
        for name, found in psutil.net_if_addrs().items()
    }
    shown = ", ".join(f"{name} {' '.join(found)}" for name, found in addresses.items() if found)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "")
        if wanted and not wanted.startswith("^") and not _some_match(wanted.removeprefix("="), addresses):
            return Finding("fail", f"{variable}={wanted}, but there are {shown}", f"name one of them in {variable}")
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        advice = "for several hosts give MASTER_ADDR as an address, or add the name to /etc/hosts"
        return Finding("warn", f"{shown}; the host's name {name} does not resolve", advice)
    if own.startswith("127."):
        advice = "for several hosts give MASTER_ADDR as an address, not as this name"
        return Finding("warn", f"{shown}; the host's name {name} is {own}, the loopback", advice)
    return Finding("ok", f"{shown}; {name} is {own}")


def check_gloo(_: Node) -> Finding:
    """An all-reduce over two processes of this host."""
    return _finding("gloo", 2)


def check_nccl(node: Node) -> Finding:
    """An all-reduce over the GPUs of this host."""
    if not node.num_gpus:
        return node.without_gpu("NCCL")
    from torch.cuda import nccl

    found = _finding("nccl", min(node.num_gpus, _MAX_RANKS))
    return found._replace(detail=f"NCCL {'.'.join(map(str, nccl.version()))}; {found.detail}")


def _finding(backend: str, num_ranks: int) -> Finding:
    try:
        latency_ms, bytes_per_s = _all_reduce(backend, num_ranks)
    except RuntimeError as error:
        hint = (
            "NCCL_DEBUG=INFO says more" if backend == "nccl" else "a firewall between processes? GLOO_SOCKET_IFNAME=lo?"
        )
        return Finding("fail", f"an all-reduce by {backend} failed ({error})", hint)
    return Finding(
        "ok",
        f"an all-reduce by {backend} over {num_ranks} processes of this host: {latency_ms:.2f} ms for one number, "
        f"{bytes_per_s / 1e6:,.0f} MB/s for 16 MB",
    )


def _all_reduce(backend: str, num_ranks: int) -> tuple[float, float]:
    """(ms of one number, bytes a second of 16 MB) as rank 0 measures them, in processes of their own.

    Raises:
        RuntimeError: they fail, or do not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastssl.doctor.all_reduce", backend, str(num_ranks), f"{folder}/store"]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        ranks = [
            subprocess.Popen(
                [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for rank in range(num_ranks)
        ]
        try:
            said = [rank.communicate(timeout=_TIMEOUT_S) for rank in ranks]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end within {_TIMEOUT_S} s") from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    for rank, (_, err) in zip(ranks, said, strict=True):
        if rank.returncode:
            raise RuntimeError((err.strip().splitlines() or [f"exit code {rank.returncode}"])[-1][:200])
    found = json.loads(said[0][0])
    return found["latency_ms"], found["bytes_per_s"]


def _some_match(wanted: str, names: dict[str, list[str]]) -> bool:
    """NCCL takes prefixes, in a list; gloo names, in a list."""
    return any(name.startswith(prefix) for prefix in wanted.split(",") for name in names)
