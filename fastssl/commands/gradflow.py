"""`fastssl gradflow`: a loss's closed-form gradient against autograd, pair by pair."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_batches, add_command, batch_settings, steps_of
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    gradflow = add_command(commands, "gradflow", "compare a loss's closed-form gradient with autograd, pair by pair")
    gradflow.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    add_batches(gradflow)
    add_output(gradflow)
    gradflow.set_defaults(call=_gradflow)


def _gradflow(args: argparse.Namespace) -> None:
    from fastssl.analysis.gradflow import gradflow

    what = {"steps": steps_of(args), "settings": batch_settings(args), "out": args.out}
    print_report(args, lambda: gradflow(args.run, args.set, **what))
