"""`fastssl inspect`: print what a .beton file contains and draw a contact sheet."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command
from pipelines.errors import DataError
from pipelines.printable import printable, printable_lines


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    inspect = add_command(commands, "inspect", "print what a .beton file contains and draw a contact sheet")
    inspect.add_argument("beton", type=Path, metavar="X.beton", help="the file to inspect")
    inspect.add_argument("--out", type=Path, metavar="X.png", help="contact sheet to write (default: next to the file)")
    inspect.set_defaults(call=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    import yaml

    from pipelines.beton import BetonReader, inspect
    from pipelines.contact_sheet import contact_sheet

    print(printable_lines(yaml.safe_dump(inspect(args.beton), sort_keys=False, allow_unicode=True)), end="")
    out = args.out or args.beton.with_name(f"{args.beton.name}.png")
    try:
        contact_sheet(BetonReader(args.beton), out)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror})") from None
    print(f"contact_sheet: {printable(out)}")
