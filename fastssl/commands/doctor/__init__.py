"""`fastssl doctor`: check whether this machine is ready for training, with advice."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_set
from fastssl.commands.output import add_json


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    doctor = add_command(commands, "doctor", "check whether this machine is ready for training, with advice")
    doctor.add_argument(
        "--cfg", nargs="+", type=Path, metavar="X.yaml", help="also check what the run of this configuration needs"
    )
    add_set(doctor)
    doctor.add_argument(
        "--data",
        metavar="PATH|URL",
        help="folder, .beton file, data set of many or URL whose speed to measure (default: data.train)",
    )
    add_json(doctor, "the findings")
    doctor.set_defaults(call=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from fastssl.commands.doctor.examine import doctor
    from fastssl.config import load_config

    cfg = load_config(args.cfg, args.set) if args.cfg else None
    return doctor(cfg, args.data, as_json=args.json)
