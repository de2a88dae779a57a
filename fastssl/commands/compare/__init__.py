"""`fastssl compare`: train and evaluate several configurations with several seeds."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_set
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    compare = add_command(commands, "compare", "train and evaluate several configurations with several seeds")
    compare.add_argument("configs", nargs="+", type=Path, metavar="X.yaml", help="the configurations to compare")
    compare.add_argument(
        "--base", nargs="+", type=Path, default=[], metavar="X.yaml", help="read these files first, for all of them"
    )
    compare.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="train each configuration with seeds 0 to N - 1 (default: 3)"
    )
    compare.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        metavar="FOLDER",
        help="folder for the runs and the table (default: runs/compare)",
    )
    add_set(compare, "override keys of all configurations")
    _add_values(compare, "--sweep", "repeat each configuration with each of these values")
    _add_values(compare, "--tune", "first choose one of these values for each configuration, on held-out images")
    compare.add_argument(
        "--tune-on", metavar="PROTOCOL", help="protocol that --tune chooses by (default: the first of eval.what)"
    )
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    compare.add_argument(
        "--on-test", action="store_true", help="evaluate on data.test (default: on held-out training images)"
    )
    compare.add_argument(
        "--launcher",
        default="",
        metavar="COMMAND",
        help="command that starts a training, such as 'deepspeed --num_gpus 8' (default: one process)",
    )
    add_output(compare)
    compare.set_defaults(call=_compare)


def _add_values(command: argparse.ArgumentParser, option: str, what: str) -> None:
    command.add_argument(option, nargs="+", action="extend", default=[], metavar="KEY=V1,V2", help=what)


def _compare(args: argparse.Namespace) -> None:
    from fastssl.commands.compare.compare_runs import compare

    names = ("base", "sweep", "tune", "tune_on", "on_test", "launcher")
    settings = {name: getattr(args, name) for name in names} | {"overrides": args.set, "num_jobs": args.jobs}
    print_report(args, lambda: compare(args.configs, args.out, num_seeds=args.seeds, **settings))
