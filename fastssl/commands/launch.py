"""`fastssl launch`: start a training by deepspeed or torchrun, without the launcher's own lines unless it fails."""

import argparse
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import IO, TextIO

from fastssl.commands.options import Commands, add_command
from fastssl.errors import UserError
from fastssl.processes.children import signals_passed_on
from pipelines.printable import printable

# What DeepSpeed 0.19 logs on stdout, `[2026-01-31 12:00:00,000] [INFO] [launch.py:152:main] ...`, and torch 2.13 on
# stderr, `W0131 12:00:00.000000 4242 torch/distributed/run.py:803] ...`.
_OF_DEEPSPEED = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\] \[[A-Z]+\] \[\w+\.py:"
_OF_TORCH = r"[DIWEC]\d{4} \d\d:\d\d:\d\d\.\d+ \d+ torch/distributed/"
_OF_LAUNCHER = re.compile(f"{_OF_DEEPSPEED}|{_OF_TORCH}")
_ERROR = re.compile(r"fastssl: error( \(rank \d+\))?: ")
_CONSEQUENCE = "lost another process of the run"  # the error of a rank whose peer has failed
_MAX_HELD_LINES = 1000


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    launch = add_command(commands, "launch", "start a training by deepspeed or torchrun, showing only its own lines")
    launch.epilog = (
        "Such as: fastssl launch deepspeed --num_gpus 2 fastssl/train.py --cfg X.yaml. If the launcher fails, its own "
        "lines are shown too, and the training's errors last."
    )
    launch.add_argument("launcher", metavar="LAUNCHER", help="deepspeed, torchrun or another program")
    launch.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    launch.set_defaults(call=_launch)


def _launch(args: argparse.Namespace) -> int:
    """Run the launcher and pass on what its processes print; returns its exit code."""
    command = [args.launcher, *args.arguments]
    with signals_passed_on() as child:
        try:
            process = child.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            reason = f"{args.launcher}: {error.strerror}: name a program that is installed and in PATH"
            raise UserError(reason) from None
        return _relay(process)


def _relay(process: "subprocess.Popen[bytes]") -> int:
    assert process.stdout is not None
    assert process.stderr is not None
    held: deque[str] = deque(maxlen=_MAX_HELD_LINES)
    errors: list[str] = []
    readers = [
        threading.Thread(target=_pass_on, args=(pipe, to, held, errors))
        for pipe, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    code = process.wait()
    for reader in readers:
        reader.join()
    if code:
        sys.stderr.writelines(held)
    sys.stderr.writelines(_last_words(errors))
    return code if code >= 0 else 128 - code


def _pass_on(pipe: IO[bytes], to: TextIO, held: deque[str], errors: list[str]) -> None:
    """Print the lines of a pipe as they come; keep the launcher's and the errors for the end."""
    for raw in pipe:
        line = raw.decode(errors="replace")
        if _OF_LAUNCHER.match(line):
            held.append(f"{printable(line.rstrip())}\n")
        elif _ERROR.match(line):
            errors.append(line)
        else:
            try:
                to.buffer.write(raw)  # as it came, whatever the encoding of this process
                to.buffer.flush()
            except OSError:  # the reader of our output, such as `head`, has gone, or its disk is full; training goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())


def _last_words(errors: Sequence[str]) -> list[str]:
    """Each error once: without its rank where all ranks say the same, and what another one's failure caused first."""
    messages = list(dict.fromkeys(_ERROR.sub("", error, count=1) for error in errors))
    if len(messages) == 1 and len(errors) > 1:
        return [f"fastssl: error: {messages[0]}"]
    return sorted(dict.fromkeys(errors), key=lambda error: _CONSEQUENCE not in error)
