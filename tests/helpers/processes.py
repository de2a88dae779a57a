"""Starts this project's programs as a user would, and trainings in processes that have imported everything."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def environment(device: str = "cpu") -> dict[str, str]:
    """The environment variables of a user who calls the programs of the virtual environment."""
    bin_folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": device}


def free_port() -> str:
    """A TCP port of this machine without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_training(arguments: Sequence[str], *, num_ranks: int, log: Path) -> list[BaseProcess]:
    """`start_command` for `fastssl train ARGUMENTS`."""
    return start_command(["train", *arguments], num_ranks=num_ranks, log=log)


def start_command(arguments: Sequence[str], *, num_ranks: int, log: Path) -> list[BaseProcess]:
    """Start `fastssl ARGUMENTS` on `num_ranks` gloo ranks, each forked from a process that has done the imports.

    A start takes one or two seconds; the launchers need five to eight. The ranks are real processes.
    """
    port = free_port()
    ranks = [
        forkserver().Process(target=run_as_rank, args=(list(arguments), rank, num_ranks, port, log))
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def run_command_forked(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `fastssl ARGUMENTS` in a process that has done the imports of a training; its output is kept in `folder`."""
    code = "import sys; from fastssl.cli import main; sys.exit(main(sys.argv[1:]))"
    return run_program_forked(code, arguments, folder)


def run_program_forked(code: str, arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -c CODE ARGUMENTS` from the repository's root, without the seconds of a training's imports."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    process = forkserver().Process(target=_execute, args=(code, list(arguments), out, err))
    process.start()
    process.join(240)
    if process.exitcode is None:
        process.kill()
        process.join()
    returncode = process.exitcode
    assert returncode is not None
    return subprocess.CompletedProcess(arguments, returncode, out.read_text(), err.read_text())


def _execute(code: str, arguments: list[str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def forkserver() -> multiprocessing.context.ForkServerContext:
    """The context for processes that have already done the imports of a training."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.imported", "tests.helpers.processes"])
    return context


def train_as_rank(arguments: list[str], rank: int, num_ranks: int, port: str, log: Path) -> None:
    """`run_as_rank` for `fastssl train ARGUMENTS`."""
    run_as_rank(["train", *arguments], rank, num_ranks, port, log)


def run_as_rank(arguments: list[str], rank: int, num_ranks: int, port: str, log: Path) -> None:
    """Run `run_in_this_process` as one of the ranks, with the rendezvous at a port of this machine."""
    if num_ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(num_ranks), LOCAL_WORLD_SIZE=str(num_ranks))
    run_in_this_process(arguments, log)


def train_in_this_process(arguments: list[str], log: Path) -> None:
    """Run `fastssl train ARGUMENTS` from the repository's root, append its output to a file, and exit."""
    run_in_this_process(["train", *arguments], log)


def run_in_this_process(arguments: list[str], log: Path) -> None:
    """`train_in_this_process` for any command."""
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    from fastssl.cli import main

    sys.exit(main(arguments))


def start_ranks(program: str, world_size: int, folder: Path, *more: str) -> list[Any]:
    """`run_ranks`; return what each rank saved as FOLDER/rank<RANK>.pt."""
    import torch

    run_ranks(program, world_size, folder, *more)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]


def run_ranks(program: str, world_size: int, folder: Path, *more: str) -> None:
    """Run `program RANK WORLD_SIZE FOLDER MORE` in a process per rank, each forked from one that has done the imports.

    A program starts with a call of `join_ranks`, or joins by the environment variables that launchers set.
    """
    port = free_port()
    ranks = [
        forkserver().Process(target=_run_rank, args=(program, rank, world_size, folder, more, port))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        end_s = time.monotonic() + 280
        for process in ranks:
            process.join(max(end_s - time.monotonic(), 0))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    output = "".join((folder / f"rank{rank}.log").read_text() for rank in range(world_size))
    assert [process.exitcode for process in ranks] == [0] * world_size, output


def _run_rank(program: str, rank: int, world_size: int, folder: Path, more: tuple[str, ...], port: str) -> None:
    with (folder / f"rank{rank}.log").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    sys.argv = [program, str(rank), str(world_size), str(folder), *more]
    runpy.run_path(program, run_name="__main__")


def join_ranks(rank: int, world_size: int, folder: Path) -> None:
    """Join the gloo group of the ranks that `start_ranks` started."""
    import torch

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
