"""`fastssl gradnorm`: norms and variances of losses' gradients at one network."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_set
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(commands, "gradnorm", "compare the norms and variances of losses' gradients at one network")
    command.add_argument("run", type=Path, metavar="RUN", help="folder of the run whose weights are used")
    command.add_argument(
        "configs",
        nargs="*",
        type=Path,
        metavar="X.yaml",
        help="configurations of the losses to compare (default: every loss with its default settings)",
    )
    command.add_argument(
        "--base", nargs="+", type=Path, default=[], metavar="X.yaml", help="read these files first, for all of them"
    )
    command.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the last one)")
    command.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="images per batch (default: the run's data.global_batch_size)",
    )
    command.add_argument(
        "--num-batches", type=int, default=20, metavar="N", help="batches to measure, at least 2 (default: 20)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the table (default: inside the run's folder)"
    )
    add_set(command, "override keys of the run's configuration")
    add_output(command)
    command.set_defaults(call=_gradnorm)


def _gradnorm(args: argparse.Namespace) -> None:
    from fastssl.analysis.gradnorm import gradnorm

    names = ("base", "step", "batch_sizes", "num_batches", "out")
    settings = {name: getattr(args, name) for name in names}
    print_report(args, lambda: gradnorm(args.run, args.configs, overrides=args.set, **settings))
