"""`fastssl bench`: measure how fast this machine loads a .beton file."""

import argparse
from pathlib import Path

from fastssl.commands.options import Commands, add_command, add_device, add_recipe
from fastssl.commands.output import add_output, print_report


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    bench = add_command(commands, "bench", "measure how fast this machine loads a .beton file")
    parts = bench.add_subparsers(title="what to measure", required=True, metavar="PART")
    loader = add_command(parts, "loader", "measure each engine, the disk and decoding, and name the bottleneck")
    loader.add_argument(
        "beton", metavar="X.beton", help="the file to load, or a data set of many: folder, manifest, pattern or URL"
    )
    add_recipe(loader, "byol")
    loader.add_argument("--size-px", type=int, metavar="N", help="side of every view in pixels (default: the recipe's)")
    loader.add_argument(
        "--engines",
        nargs="+",
        default=["ffcv", "dali", "resident", "torch"],
        metavar="ENGINE",
        help="engines to measure (default: ffcv dali resident torch)",
    )
    loader.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch (default: 64)")
    loader.add_argument(
        "--threads", dest="num_threads", type=int, metavar="N", help="number of CPU cores to use (default: all)"
    )
    loader.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="length of a timing window (default: 2)"
    )
    add_device(loader)
    loader.add_argument("--out", type=Path, metavar="X.csv", help="append the results to this file")
    add_output(loader)
    loader.set_defaults(call=_bench_loader)


def _bench_loader(args: argparse.Namespace) -> None:
    from fastssl.commands.bench.loader import bench_loader_on

    names = ("recipe", "size_px", "engines", "batch_size", "num_threads", "seconds", "device", "out")
    settings = {name: getattr(args, name) for name in names}
    print_report(args, lambda: bench_loader_on(args.beton, **settings))
