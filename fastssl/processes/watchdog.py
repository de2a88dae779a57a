"""The other processes of a run: one that is lost ends this one with a line, on a CPU (gloo) as on GPUs (NCCL).

Three ways to lose one, three ways to notice:
- it has died: the system closes its connections, and the next exchange fails at once;
- its host is cut off or without power: nothing arrives any more, so the system is asked to probe every connection and
  to close one that is silent for run.peer_timeout_s. The probes are the kernel's: a process that is busy, in a slow
  save say, does not look lost;
- it hangs: an exchange ends after run.collective_timeout_s.

gloo raises in the exchange itself. An exchange of NCCL leaves the main thread waiting for the GPU, so a thread of
every process adds up a number over gloo, once a second, and ends the process where that fails.
"""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch
import torch.distributed as torch_dist

from fastssl import collectives
from fastssl.config import RunConfig
from fastssl.errors import PeerLostError, Preempted, print_error

_BEAT_S = 1.0
_GRACE_S = 5.0  # for a process that is ending anyway, with a better word than "lost"
_NCCL_LOSS = re.compile(r"remote process|ncclRemoteError|ncclSystemError|timed? ?out|connection", re.IGNORECASE)


class Watchdog:
    """Watches the other processes from `watch` to the end of the `with` block; alone, it does nothing.

    Errors of an exchange that say that another process is lost leave the block as PeerLostError; others as they are.

    Attributes:
        step: Gives the number of optimizer steps taken, for the message.
    """

    def __init__(self) -> None:
        self.step: Callable[[], int] = lambda: 0
        self._thread: threading.Thread | None = None
        self._is_leaving = threading.Event()
        self._has_finished = False

    def watch(self, cfg: RunConfig) -> None:
        """Begin; all ranks call it, in a process group.

        Args:
            cfg: Its timeouts.
        """
        if collectives.world_size() == 1:
            return
        group = torch_dist.new_group(backend="gloo", timeout=timedelta(seconds=cfg.collective_timeout_s))
        probe_connections(cfg.peer_timeout_s)
        self._thread = threading.Thread(target=self._beat, args=(group,), name="fastssl-watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._has_finished = error is None or isinstance(error, Preempted)  # all ranks leave
        self._is_leaving.set()
        if self._thread:
            self._thread.join(_GRACE_S)  # at the interpreter's end a thread inside of gloo would abort the process
        if error is not None and is_loss(error):
            raise PeerLostError(loss_message(error, self.step())) from None

    def _beat(self, group: torch_dist.ProcessGroup) -> None:
        try:
            while True:
                self._is_leaving.wait(_BEAT_S)
                if self._is_leaving.is_set() and not self._has_finished:
                    return
                num_finished = torch.full((1,), float(self._has_finished))
                torch_dist.all_reduce(num_finished, group=group)
                if num_finished > 0:  # every rank sees it in the same beat, after the last barrier of the run
                    return
        except RuntimeError as error:
            if not self._is_leaving.wait(_GRACE_S):
                print_error(loss_message(error, self.step()))
                exit_now(PeerLostError.exit_code)


def exit_now(code: int) -> NoReturn:
    """End at once: the destructors of a process group would wait for the processes that are lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_loss(error: BaseException) -> bool:
    """Whether an exchange failed for want of another process, not by a mistake in its use."""
    text = str(error)
    if isinstance(error, torch_dist.DistBackendError):
        return bool(_NCCL_LOSS.search(text))
    if isinstance(error, (torch_dist.DistStoreError, torch_dist.DistNetworkError)):
        return True
    # gloo has no class of its own. What it enforces (equal sizes on both sides) is a mistake in its use.
    return isinstance(error, RuntimeError) and "gloo/transport" in text and "enforce fail" not in text


def loss_message(error: BaseException, step: int) -> str:
    """One line: who noticed, when, what the network said, and how to go on."""
    return (
        f"lost another process of the run after step {step} ({reason_of(error)}), noticed by rank "
        f"{collectives.rank()} on {socket.gethostname()}: read the messages of the other processes, then resume from "
        "the last checkpoint with --set run.resume=auto"
    )


def probe_connections(peer_timeout_s: int) -> None:
    """Have the system close this process's TCP connections whose other end is silent for so long."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            connection = socket.socket(fileno=os.dup(int(descriptor.name)))
        except OSError:  # no socket, or closed since
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                _probe(connection, peer_timeout_s)


def _probe(connection: socket.socket, peer_timeout_s: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, max(1, peer_timeout_s // 3)),
        (socket.TCP_KEEPINTVL, max(1, peer_timeout_s // 6)),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, 1000 * peer_timeout_s),  # while something is sent, no probe is
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def reason_of(error: BaseException) -> str:
    """What happened to the connection, without the place in torch's source and the advice that follow it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", lines[0].strip())
    return text.split(". This is typically")[0].rstrip(". ")[:200]
