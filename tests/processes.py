"""Starting this project's programs as a user would, and trainings in processes that have imported everything."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The environment of a user who called the virtual environment's programs."""
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}


def free_port() -> str:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_training(arguments: Sequence[str], *, num_ranks: int, log: Path) -> list[BaseProcess]:
    """`fastssl train ARGUMENTS` on so many gloo ranks, each forked from a process that has the imports behind it.

    A start takes a second or two in place of the five to eight that the launchers need; the processes are real.
    """
    port = free_port()
    ranks = [
        _forkserver().Process(target=_train, args=(list(arguments), rank, num_ranks, port, log))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _forkserver() -> multiprocessing.context.ForkServerContext:
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported", "tests.processes"])
    return context


def _train(arguments: list[str], rank: int, num_ranks: int, port: str, log: Path) -> None:
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    if num_ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    from fastssl.cli import main

    sys.exit(main(["train", *arguments]))
