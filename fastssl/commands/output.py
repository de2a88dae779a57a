"""What commands print: a table in the width of the terminal, or with --json its values alone on stdout."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.tracking.report import Report

_STDOUT, _STDERR = 1, 2  # file descriptors


def add_output(command: argparse.ArgumentParser) -> None:
    """Add --json and --wide."""
    add_json(command)
    command.add_argument(
        "--wide", action="store_true", help="print all columns (default: those that fit the terminal, or COLUMNS)"
    )


def add_json(command: argparse.ArgumentParser, what: str = "the result") -> None:
    """Add --json."""
    command.add_argument("--json", action="store_true", help=f"print {what} as JSON, everything else on stderr")


def print_report(args: argparse.Namespace, find: Callable[[], "Report"]) -> None:
    """Do a command's work and print its report as the options of `add_output` say."""
    if args.json:
        print_json(find=lambda: find().values)
    else:
        print(find().text(None if args.wide else shutil.get_terminal_size().columns))


def print_json(find: Callable[[], Any]) -> None:
    """Do a command's work and print what it returns as JSON; what it prints itself goes to stderr.

    Args:
        find: The work; None, of processes that leave the result to another one, prints nothing.
    """
    from fastssl.tracking.report import to_json

    with _stdout_on_stderr():
        values = find()
    if values is not None:
        print(to_json(values))


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send stdout to stderr: of Python, of libraries in C and of programs that are started."""
    sys.stdout.flush()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, _STDOUT)
        os.close(kept)
