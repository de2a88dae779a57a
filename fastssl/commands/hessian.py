"""`fastssl hessian`: eigenvalues of the loss's Hessian at the weights of trained runs."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_batches, add_command, batch_settings, steps_of
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    hessian = add_command(
        commands, "hessian", "compute eigenvalues of the loss's Hessian at the weights of trained runs"
    )
    hessian.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs; they share one plot")
    hessian.add_argument(
        "--num-probes", type=int, default=4, metavar="N", help="number of random start vectors (default: 4)"
    )
    hessian.add_argument(
        "--num-iterations", type=int, default=64, metavar="N", help="Lanczos steps per start vector (default: 64)"
    )
    hessian.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="number of largest eigenvalues to report (default: 5)"
    )
    hessian.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the start vectors (default: 0)")
    add_batches(hessian)
    add_output(hessian)
    hessian.set_defaults(call=_hessian)


def _hessian(args: argparse.Namespace) -> None:
    from fastssl.analysis.hessian import HessianSettings, hessian_of_runs

    names = ("num_probes", "num_iterations", "top_k", "seed")
    settings = HessianSettings(**{name: getattr(args, name) for name in names}, batches=batch_settings(args))
    what = {"steps": steps_of(args), "settings": settings, "out": args.out}
    print_report(args, lambda: hessian_of_runs(args.runs, args.set, **what))
