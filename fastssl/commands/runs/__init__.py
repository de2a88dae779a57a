"""`fastssl runs`: list the runs of a folder with their state and accuracy."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    runs = add_command(commands, "runs", "list the runs of a folder: loss, state, accuracy, time")
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="folder of runs (default: runs)"
    )
    add_output(runs)
    runs.set_defaults(call=_runs)


def _runs(args: argparse.Namespace) -> None:
    from fastssl.commands.runs.list_runs import list_runs

    print_report(args, lambda: list_runs(args.folder))
