"""`fastssl eval`: evaluate the encoder of a run."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_set
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    evaluate = add_command(commands, "eval", "evaluate the encoder of a run")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    evaluate.add_argument(
        "--what",
        nargs="+",
        action="extend",
        default=[],
        metavar="PROTOCOL",
        help="knn, linear, logistic, few_label, linear_augmented, finetune (default: the run's eval.what)",
    )
    evaluate.add_argument(
        "--on",
        metavar="X.beton|FOLDER|URL",
        help="evaluate on another data set, of one file or many (default: the run's own)",
    )
    evaluate.add_argument(
        "--test",
        metavar="TEST.beton|FOLDER|URL",
        help="test set (default: the run's data.test; with --on, images held out of that file)",
    )
    evaluate.add_argument(
        "--step", type=int, metavar="N", help="step of the checkpoint (default: the last and the best)"
    )
    add_set(evaluate)
    add_output(evaluate)
    evaluate.set_defaults(call=_eval)


def _eval(args: argparse.Namespace) -> None:
    from fastssl.commands.eval.evaluate_run import evaluate_run

    settings = {name: getattr(args, name) for name in ("what", "on", "test", "step")}
    print_report(args, lambda: evaluate_run(args.run, args.set, **settings))
