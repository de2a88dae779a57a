"""Options that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fastssl.commands.argument_parser import ArgumentParser

if TYPE_CHECKING:
    from fastssl.analysis.source import BatchSettings

Commands: TypeAlias = "argparse._SubParsersAction[ArgumentParser]"

# `pipelines.convert.sources.SourceKind`, whose module would make `fastssl --help` slow.
SOURCE_KINDS = ("folder", "csv", "webdataset", "parquet", "torchvision", "npz", "digits")
_NAMED_KINDS = ("torchvision", "digits")  # which no path tells
INFERRED_KINDS = tuple(kind for kind in SOURCE_KINDS if kind not in _NAMED_KINDS)
ANY_IMAGES = (
    "one file; or a data set of many: its folder, the dataset.json in it, a pattern such as 'set/*.beton', or a URL"
)
_DEVICES = ("auto", "cpu", "cuda")


def add_command(commands: Commands, name: str, summary: str) -> ArgumentParser:
    """Add a sub-command; its own --help begins with the same summary as a sentence."""
    return commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")


def add_set(command: argparse.ArgumentParser, what: str = "override keys of the configuration") -> None:
    """Add --set."""
    command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=what)


def add_recipe(command: argparse.ArgumentParser, default: str) -> None:
    """Add --recipe."""
    command.add_argument(
        "--recipe", default=default, help=f"name of a recipe, or a .yaml file with one (default: {default})"
    )


def add_kind(command: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    """Add --from, the kind of a source, as `kind`."""
    named = [kind for kind in _NAMED_KINDS if kind in kinds]
    must = f"; {' and '.join(named)} must be named" if named else ""
    command.add_argument(
        "--from",
        dest="kind",
        choices=kinds,
        metavar="KIND",
        help=f"kind of source: {', '.join(kinds)} (default: by what it is{must})",
    )


def add_max_bad(command: argparse.ArgumentParser) -> None:
    """Add --max-bad."""
    command.add_argument(
        "--max-bad",
        type=float,
        metavar="FRACTION",
        help="fail if more than this fraction of the images is corrupt; fewer are left out and listed (default: 0.1)",
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """Add --device."""
    command.add_argument(
        "--device",
        choices=_DEVICES,
        default="auto",
        metavar="DEVICE",
        help=f"one of {', '.join(_DEVICES)} (default: auto, which takes a GPU if there is one)",
    )


def add_batches(command: argparse.ArgumentParser) -> None:
    """Add which checkpoints and batches an analysis uses, where it writes, and --set."""
    step = command.add_mutually_exclusive_group()
    step.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the last one)")
    step.add_argument(
        "--steps", type=_series, metavar="N,N,last", help="steps of several checkpoints, such as 100,1000,last"
    )
    command.add_argument(
        "--num-images",
        type=int,
        metavar="N",
        help="number of training images, a multiple of the batch size (default: four batches)",
    )
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="images per batch (default: the run's data.global_batch_size)"
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the results (default: inside the run's folder)"
    )
    add_set(command)


def _series(text: str) -> list[int | None]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "last" or (part.isascii() and part.isdigit()) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be steps with commas between them, such as 100,1000,last")
    return [None if part == "last" else int(part) for part in parts]


def steps_of(args: argparse.Namespace) -> list[int | None]:
    """The steps of --steps or --step; None: the last."""
    return args.steps or [args.step]


def batch_settings(args: argparse.Namespace) -> "BatchSettings":
    """The options of `add_batches` that choose batches."""
    from fastssl.analysis.source import BatchSettings

    return BatchSettings(num_images=args.num_images, batch_size=args.batch_size)
