"""`fastssl embed`: the features of images, as a table."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastssl.commands.options import SOURCE_KINDS, Commands, add_command, add_device, add_kind
from fastssl.commands.output import add_json, print_json
from pipelines.printable import printable

if TYPE_CHECKING:
    from fastssl.embedding.write import EmbedReport


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    embed = add_command(commands, "embed", "write the features of images to a table, by a run's encoder")
    embed.epilog = "On several processes or GPUs: torchrun --nproc-per-node N -m fastssl.cli embed ..."
    embed.add_argument(
        "src",
        metavar="IMAGES",
        help="folder of images, .beton file, data set of many (folder, dataset.json, pattern or URL), or a folder, a "
        "file or a pattern of .parquet or .tar files; no conversion is needed",
    )
    embed.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="RUN|FILE",
        help="folder of a run or of a checkpoint, or weights.pt",
    )
    embed.add_argument(
        "--out", type=Path, required=True, metavar="X.parquet|X.npy", help="table, or array of features only, to write"
    )
    embed.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="images per forward pass (default: 256)"
    )
    add_device(embed)
    embed.add_argument("--overwrite", action="store_true", help="replace X if it exists")
    add_kind(embed, ("beton", "shards", *SOURCE_KINDS))
    embed.add_argument("--split", help="as of fastssl convert, for digits, npz and torchvision")
    embed.add_argument("--root", metavar="FOLDER", help="as of fastssl convert, for torchvision")
    embed.add_argument("--image-column", metavar="NAME", help="as of fastssl convert, for parquet")
    embed.add_argument("--label-column", metavar="NAME", help="as of fastssl convert, for parquet")
    add_json(embed)
    embed.set_defaults(call=_embed)


def _embed(args: argparse.Namespace) -> None:
    if args.json:
        print_json(lambda: (report := _embedded(args)) and asdict(report))
    elif report := _embedded(args):
        _print_lines(args.out, report)


def _embedded(args: argparse.Namespace) -> "EmbedReport | None":
    """Write the table; None on other processes than the first."""
    import torch

    from fastssl import collectives
    from fastssl.commands.device_option import choose_device_option
    from fastssl.config import RunConfig
    from fastssl.embedding.table import check_out
    from fastssl.embedding.write import embed_to_file
    from fastssl.processes.rendezvous import joined_processes
    from pipelines.loader import cores_per_process

    check_out(args.out, overwrite=args.overwrite)
    options = {name: getattr(args, name) for name in ("split", "root", "image_column", "label_column")}
    device = choose_device_option(args.device)
    torch.set_num_threads(cores_per_process())
    with joined_processes(RunConfig()):
        report = embed_to_file(
            args.src,
            args.model,
            args.out,
            kind=args.kind,
            options=options,
            batch_size=args.batch_size,
            device=device,
            overwrite=args.overwrite,
        )
        return report if collectives.rank() == 0 else None


def _print_lines(out: Path, report: "EmbedReport") -> None:
    print(
        f"{printable(out)}: {report.num_images:,} images, {report.num_features:,} features each, "
        f"{report.num_broken:,} broken, in {report.wall_s:.1f} s on {report.device}"
    )
    for path, reason in report.examples:
        print(f"broken: {printable(path)}: {printable(reason)}")
    if report.num_broken > len(report.examples):
        where = f"{out}.errors.txt" if out.suffix == ".npy" else f"the column error of {out}"
        print(f"broken: {report.num_broken - len(report.examples):,} more; see {printable(where)}")
    if out.suffix == ".parquet":
        print(f"next: fastssl neighbours {printable(out)} IMAGE")
