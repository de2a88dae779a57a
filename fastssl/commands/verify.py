"""`fastssl verify`: check a .beton file, or a data set of many."""

import argparse
from dataclasses import asdict

from fastssl.commands.options import ANY_IMAGES, Commands, add_command
from fastssl.commands.output import add_json, print_json


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    verify = add_command(
        commands, "verify", "check a .beton file or a data set of many: checksums, and that every image decodes"
    )
    verify.add_argument("beton", metavar="X.beton|FOLDER|URL", help=ANY_IMAGES)
    add_json(verify)
    verify.set_defaults(call=_verify)


def _verify(args: argparse.Namespace) -> None:
    from pipelines.verify import verify_any

    if args.json:
        print_json(lambda: asdict(verify_any(args.beton)))
    else:
        print(verify_any(args.beton))
