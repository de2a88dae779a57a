"""`fastssl convert`: convert images to a .beton file."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastssl.commands.options import SOURCE_KINDS, Commands, add_command, add_kind, add_max_bad
from fastssl.commands.output import add_json, print_json
from pipelines.printable import printable

if TYPE_CHECKING:
    from pipelines.convert import ConvertReport


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    convert = add_command(commands, "convert", "convert images to a .beton file")
    add_kind(convert, SOURCE_KINDS)
    convert.add_argument(
        "src",
        nargs="*",
        metavar="SRC",
        help="folder: a folder of images. csv: a table with the columns path and, if labelled, label. webdataset, "
        "parquet: a folder, a file, a pattern such as x-{000..012}.tar, or a URL of these. torchvision: name of the "
        "data set, such as CIFAR10. npz: the file. digits: leave SRC out. Several are written one after the other, and "
        "classes of one name become one",
    )
    convert.add_argument(
        "out", metavar="OUT.beton", help="the file to write, or its URL in object storage: s3://bucket/photos/x.beton"
    )
    convert.add_argument(
        "--work-dir",
        metavar="DIR",
        help="with a URL: a folder for the file until it is there; with the same folder and --resume, a conversion "
        "that was killed continues (default: the system's temporary folder, and a new start)",
    )
    convert.add_argument("--classes", metavar="FILE", help="folder: read only the sub-folders named in this file")
    convert.add_argument(
        "--labels",
        choices=["auto", "folders", "none"],
        default="auto",
        help="folder: whether sub-folders are classes (default: auto, unless one holds all images, each holds one, or "
        "they are named train, val and the like)",
    )
    convert.add_argument(
        "--split",
        help="digits: train or test (default: both). npz: read the arrays x_SPLIT and y_SPLIT. torchvision: the data "
        "set's own name of the split",
    )
    convert.add_argument("--root", metavar="FOLDER", help="torchvision: folder of its data sets")
    convert.add_argument("--download", action="store_true", help="torchvision: download files missing in --root")
    convert.add_argument(
        "--image-column", metavar="NAME", help="parquet: column with the images (default: the only one, or image)"
    )
    convert.add_argument(
        "--label-column", metavar="NAME", help="parquet: column with integer labels (default: label, if present)"
    )
    convert.add_argument("--max-px", type=int, metavar="N", help="shrink images whose longer side exceeds N pixels")
    convert.add_argument(
        "--quality", type=int, default=95, metavar="N", help="JPEG quality of re-encoded images, 1 to 100 (default: 95)"
    )
    convert.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        help="fail at the first corrupt image, as --max-bad 0, or leave all out, as --max-bad 1",
    )
    add_max_bad(convert)
    convert.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="write the images in a random order, the same for the same seed, so that all shards have all classes "
        "(default: the order of the source)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    convert.add_argument(
        "--resume",
        action="store_true",
        help="resume an interrupted conversion: repeat its command with this option added",
    )
    convert.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="write N files OUT-00000-of-0000N.beton, each with an equal, contiguous part of the images: to share "
        "the work among machines, or for parts of a data set (a training reads one file)",
    )
    convert.add_argument("--shard", type=int, metavar="I", help="with --shards: write only file I, counted from 0")
    convert.add_argument(
        "--workers", type=int, default=0, metavar="N", help="worker processes (default: 0, one thread per core instead)"
    )
    add_json(convert)
    convert.set_defaults(call=_convert)


def _convert(args: argparse.Namespace) -> None:
    if args.json:
        print_json(lambda: {"files": [asdict(done) for done in _converted(args)]})
        return
    for done in _converted(args):
        line = f"{printable(done.url or done.out)}: {done.num_images:,} images"
        if done.num_images == done.num_passed + done.num_encoded + done.num_raw:  # else it was finished before
            line += (
                f" in {done.wall_s:.1f} s "
                f"({done.num_passed:,} JPEGs as they were, {done.num_encoded:,} encoded, {done.num_raw:,} raw), "
                f"{done.num_skipped:,} corrupt, {done.num_ignored:,} others left out"
            )
        print(line)


def _converted(args: argparse.Namespace) -> "list[ConvertReport]":
    from fastssl.errors import UserError
    from pipelines.convert import convert, convert_shards

    names = (
        "max_px",
        "quality",
        "on_error",
        "max_bad",
        "overwrite",
        "resume",
        "classes",
        "labels",
        "split",
        "root",
        "shuffle",
        "work_dir",
    )
    options = {name: getattr(args, name) for name in (*names, "download", "image_column", "label_column")} | {
        "num_workers": args.workers
    }
    src = args.src or None
    try:
        if args.shards is not None:
            return convert_shards(args.kind, src, args.out, num_shards=args.shards, shard=args.shard, **options)
        if args.shard is not None:
            raise ValueError("--shard needs --shards, the total number of files")
        return [convert(args.kind, src, args.out, **options)]
    except ValueError as error:
        raise UserError(str(error)) from None
