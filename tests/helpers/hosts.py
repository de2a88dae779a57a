"""Two hosts on one machine: network namespaces, connected by a cable (a veth pair) that can be cut.

They share the file system and the clock, as the hosts of a cluster do. Each has its own address, loopback and routing
table, and the cable is the only connection between them.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.processes import ROOT, environment

_PREFIX = "fastssl"
PORT = "29400"  # free, because nothing else runs in these namespaces


class Host:
    """One of the two hosts: a namespace, its end of the cable, and the programs that run in it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.namespace = f"{_PREFIX}-{os.getpid()}-{rank}"
        self.cable = f"fs{os.getpid() % 10**7}-{rank}"  # an interface's name has at most 15 characters
        self.address = f"10.77.0.{rank + 1}"

    def start(self, *command: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a program on this host; stdout and stderr go to `log`.out and `log`.err."""
        with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *map(str, command)],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def deepspeed(self, hostfile: Path, *arguments: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Start DeepSpeed's launcher on this host only, without ssh, as a scheduler does on each host."""
        where = ["--hostfile", hostfile, "--no_ssh", "--node_rank", str(self.rank)]
        master = ["--master_addr", "10.77.0.1", "--master_port", PORT]
        return self.start("deepspeed", *where, *master, "fastssl/train.py", *arguments, log=log)

    def pids(self) -> list[str]:
        """The ids of the processes on this host."""
        return _output("ip", "netns", "pids", self.namespace).split()

    def kill(self) -> None:
        """Kill all processes on this host (kill -9)."""
        if pids := self.pids():
            subprocess.run(["kill", "-9", *pids], stderr=subprocess.DEVNULL)

    def unplug(self) -> None:
        """Cut the cable: packets are lost without a notice to either side."""
        _ip("-n", self.namespace, "link", "set", self.cable, "down")


def why_not() -> str | None:
    """The reason why this machine cannot have such hosts; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "`ip` is missing: apt-get install iproute2"
    name = f"{_PREFIX}-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return f"no network namespace can be made ({made.stderr.strip()})" if made.returncode else None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make the two hosts; at the end, remove them and all their processes."""
    _remove_left_over()
    a, b = hosts = Host(0), Host(1)
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        peer = ["peer", "name", b.cable, "netns", b.namespace]
        _ip("link", "add", a.cable, "netns", a.namespace, "type", "veth", *peer)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.cable)
            _ip("-n", host.namespace, "link", "set", host.cable, "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            _remove(host.namespace)


def wait_for(condition, *, timeout_s: float, what: str) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)


def _remove_left_over() -> None:
    """Remove the hosts of a killed test, whose process no longer exists."""
    for line in _output("ip", "netns", "list").splitlines():
        name, _, _ = line.partition(" ")
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == _PREFIX and pid.isdigit() and not Path("/proc", pid).exists():
            _remove(name)


def _remove(namespace: str) -> None:
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)  # this also removes its end of the cable


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout
