"""`fastssl verify`: check a .beton file."""

import argparse
from dataclasses import asdict
from pathlib import Path

from fastssl.commands.options import Commands, add_command
from fastssl.commands.output import add_json, print_json


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    verify = add_command(commands, "verify", "check a .beton file: its checksum, and that every image decodes")
    verify.add_argument("beton", type=Path, metavar="X.beton", help="the file to check")
    add_json(verify)
    verify.set_defaults(call=_verify)


def _verify(args: argparse.Namespace) -> None:
    from pipelines.verify import verify

    if args.json:
        print_json(lambda: asdict(verify(args.beton)))
    else:
        print(verify(args.beton))
