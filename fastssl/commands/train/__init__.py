"""`fastssl train`: train on images without a configuration, or one run of a configuration in this process."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastssl.commands.options import INFERRED_KINDS, Commands, add_command, add_kind, add_max_bad, add_set

if TYPE_CHECKING:
    from fastssl.processes.preemption import StopRequest


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    train = add_command(commands, "train", "train on a folder of images, or as a configuration says")
    train.epilog = (
        "With SRC, all settings are chosen, shown and written to RUN/start.yaml, and the run's time is measured before "
        "it begins. With a configuration, for several processes or GPUs: deepspeed fastssl/train.py --cfg X.yaml, or "
        "torchrun."
    )
    train.add_argument(
        "sources", nargs="*", metavar="SRC", help="folders of images, or other sources of fastssl convert"
    )
    train.add_argument(
        "--cfg",
        nargs="+",
        type=Path,
        default=[],
        metavar="X.yaml",
        help="configuration, instead of SRC; keys of later files override those of earlier ones",
    )
    add_set(train)
    train.add_argument("--run", type=Path, metavar="RUN", help="folder of the run (default: runs/ and the name of SRC)")
    add_kind(train, INFERRED_KINDS)
    add_max_bad(train)
    train.add_argument("--test", metavar="SRC", help="test images with the same classes, to evaluate on")
    train.add_argument(
        "--hours",
        type=float,
        metavar="H",
        help="time for training and evaluation (default: at most half an hour on a CPU, 12 hours on a GPU)",
    )
    train.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from torchvision, torchvision:NAME, timm:NAME, a run or a file of weights (default: random)",
    )
    train.add_argument(
        "--processes", type=int, metavar="N", help="processes to train in (default: one per GPU, or one on the CPU)"
    )
    train.add_argument("--dry-run", action="store_true", help="stop before the training begins")
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    train.set_defaults(call=_train)


# Options for images, by the names of their values.
_WITH_SOURCES = {
    "run": "--run",
    "kind": "--from",
    "test": "--test",
    "hours": "--hours",
    "init": "--init",
    "max_bad": "--max-bad",
    "processes": "--processes",
    "dry_run": "--dry-run",
}


def _train(args: argparse.Namespace) -> None:
    from fastssl.errors import UserError
    from fastssl.processes.preemption import StopRequest

    stop_request = StopRequest()
    if bool(args.sources) == bool(args.cfg):
        raise UserError("give images to train on, such as photos/, or a configuration with --cfg, and not both")
    if args.sources:
        _train_images(args, stop_request)
        return
    if given := [option for name, option in _WITH_SOURCES.items() if getattr(args, name) not in (None, False)]:
        raise UserError(f"{given[0]} is for images given as SRC: with --cfg, use --set")
    from fastssl.config import load_config

    cfg = load_config(args.cfg, args.set)
    from fastssl.trainer import train  # slow import, deferred so that config errors show at once

    train(cfg, stop_request=stop_request)


def _train_images(args: argparse.Namespace, stop_request: "StopRequest") -> None:
    import os

    from fastssl.errors import UserError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "SRC starts its own processes (--processes N): under a launcher, give a configuration with --cfg"
        )
    if args.processes is not None and not 1 <= args.processes <= 1024:
        raise UserError(f"--processes must be 1 to 1024, not {args.processes}")
    from fastssl.commands.train.train_images import train_images

    train_images(
        args.sources,
        run=args.run,
        kind=args.kind,
        test=args.test,
        hours=args.hours,
        init=args.init,
        max_bad=args.max_bad,
        overrides=args.set,
        num_processes=args.processes,
        dry_run=args.dry_run,
        stop_request=stop_request,
    )
