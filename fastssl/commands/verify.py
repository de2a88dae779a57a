"""`fastssl verify`: check a .beton file."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    verify = add_command(commands, "verify", "check a .beton file: its checksum, and that every image decodes")
    verify.add_argument("beton", type=Path, metavar="X.beton", help="the file to check")
    verify.set_defaults(call=_verify)


def _verify(args: argparse.Namespace) -> None:
    from pipelines.verify import verify

    print(verify(args.beton))
