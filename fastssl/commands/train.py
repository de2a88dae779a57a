"""`fastssl train`: train one run in this process."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_set


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    train = add_command(commands, "train", "train one run in this process")
    train.epilog = "For several processes or GPUs: deepspeed fastssl/train.py --cfg X.yaml, or torchrun."
    train.add_argument(
        "--cfg",
        required=True,
        nargs="+",
        type=Path,
        metavar="X.yaml",
        help="configuration; keys of later files override those of earlier ones",
    )
    add_set(train)
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    train.set_defaults(call=_train)


def _train(args: argparse.Namespace) -> None:
    from fastssl.processes.preemption import StopRequest

    stop_request = StopRequest()
    from fastssl.config import load_config

    cfg = load_config(args.cfg, args.set)
    from fastssl.trainer import train  # slow import, deferred so that config errors show at once

    train(cfg, stop_request=stop_request)
