"""`fastssl report`: an HTML page about one or several runs."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_device
from pipelines.printable import printable


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    report = add_command(commands, "report", "write one HTML page about runs: curves, features, images, settings")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs; they share one page")
    report.add_argument(
        "--out", type=Path, metavar="X.html", help="file to write (default: report.html in the first run's folder)"
    )
    report.add_argument(
        "--num-images",
        type=int,
        default=2000,
        metavar="N",
        help="most held-out images to encode, for the pictures of the features (default: 2000)",
    )
    add_device(report)
    report.set_defaults(call=_report)


def _report(args: argparse.Namespace) -> None:
    from fastssl.commands.device_option import choose_device_option
    from fastssl.report.write_report import write_report

    device = choose_device_option(args.device)
    out = write_report(
        args.runs, args.out, num_images=args.num_images, device=device, say=lambda line: print(printable(line))
    )
    print(f"report: {printable(out)} ({out.stat().st_size / 1e6:.1f} MB)")
