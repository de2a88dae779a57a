"""The `fastssl` command: its sub-commands, which have a file each in fastssl/commands/, and how they end."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl import __version__
from fastssl.commands import (
    bench,
    compare,
    completion,
    convert,
    doctor,
    embed,
    eval,
    export,
    gradflow,
    gradnorm,
    hessian,
    inspect,
    launch,
    manifest,
    neighbours,
    report,
    runs,
    train,
    verify,
    views,
)
from fastssl.commands.argument_parser import ArgumentParser
from pipelines.errors import DataError
from pipelines.path_names import why_no_path
from pipelines.printable import printable

_OUT_OF_MEMORY = (
    "the GPU's memory is full: a smaller batch needs less (data.global_batch_size, eval.local_batch_size), and so do "
    "train.num_micro_batches and model.activation_checkpointing"
)

# In the order of --help.
COMMANDS = (
    train,
    launch,
    convert,
    manifest,
    verify,
    inspect,
    views,
    eval,
    embed,
    neighbours,
    export,
    compare,
    hessian,
    gradflow,
    gradnorm,
    runs,
    report,
    doctor,
    bench,
    completion,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0, also for a training that a signal ended after a checkpoint; 1 if a check of the doctor failed; 2
            for bad input, 3 for a run that diverged, 4 for a run that lost one of its processes; 130 for a command
            that Ctrl-C ended. 2 and above come with one line on stderr.
    """
    args = _parser().parse_args(argv)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    from fastssl.errors import DivergedError, PeerLostError, Preempted, UserError
    from fastssl.machine.open_files import allow_open_files
    from fastssl.machine.thread_waiting import let_threads_sleep

    let_threads_sleep()  # before a command imports torch
    try:
        allow_open_files()
        _check_paths(args)
        code = args.call(args)
    except (UserError, DataError) as error:
        return _fail(str(error), 2)
    except DivergedError as error:
        return _fail(str(error), 3)
    except Preempted as notice:
        print(printable(f"fastssl: {notice}"), flush=True)
        return 0
    except PeerLostError as error:
        from fastssl.processes.watchdog import exit_now

        return exit_now(_fail(str(error), PeerLostError.exit_code))
    except KeyboardInterrupt:
        return _fail(
            "interrupted: the same command continues a `train FOLDER`; with --cfg add --set run.resume=auto, with "
            "convert --resume",
            130,
        )
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RuntimeError as error:
        from fastssl.machine.nvidia_gpu import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail(f"{_OUT_OF_MEMORY} ({str(error).strip().splitlines()[0]:.200})", 2)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _fail(f"{error.filename}: {error.strerror}", 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}): free space, then resume", 2)
    return code or 0


# Options and arguments that name a path, or something else such as a URL or a data set of torchvision.
_PLACES = ("src", "sources", "on", "test", "init", "root", "classes", "beton", "folder", "data")


def _check_paths(args: argparse.Namespace) -> None:
    from fastssl.errors import UserError

    for name, value in vars(args).items():
        for each in value if isinstance(value, list) else [value]:
            is_path = isinstance(each, Path) or (isinstance(each, str) and name in _PLACES)
            if is_path and (reason := why_no_path(each)):
                raise UserError(f"{str(each)!r:.300} is not a path: {reason}")


def _fail(message: str, code: int) -> int:
    from fastssl.errors import print_error

    print_error(message)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="fastssl", description="Pre-train image encoders without labels.")
    parser.add_argument("--version", action="version", version=f"fastssl {__version__}")
    parser.set_defaults(root=parser)  # for the completion of all commands
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
