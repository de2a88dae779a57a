"""`fastssl embed` and `fastssl neighbours`: their arguments, and what they print. Slow imports are deferred."""

import argparse
import json
from pathlib import Path

from pipelines.printable import printable

_KINDS = ("beton", "folder", "csv", "webdataset", "parquet", "torchvision", "npz", "digits")
_SIMILARITIES = ("centred", "whitened", "cosine")


def add_embed(embed: argparse.ArgumentParser) -> None:
    """The arguments of `fastssl embed`."""
    embed.epilog = "On several processes or GPUs: torchrun --nproc-per-node N -m fastssl.cli embed ..."
    embed.add_argument(
        "src",
        metavar="IMAGES",
        help="folder of images, .beton file, or a folder, a file or a pattern of .parquet or .tar files; no conversion "
        "is needed",
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
    embed.add_argument(
        "--device", default="auto", help="auto, cpu or cuda (default: auto, which takes a GPU if there is one)"
    )
    embed.add_argument("--overwrite", action="store_true", help="replace X if it exists")
    embed.add_argument(
        "--from",
        dest="kind",
        choices=_KINDS,
        metavar="KIND",
        help=f"kind of source: {', '.join(_KINDS)} (default: by name)",
    )
    embed.add_argument("--split", help="as of fastssl convert, for digits, npz and torchvision")
    embed.add_argument("--root", metavar="FOLDER", help="as of fastssl convert, for torchvision")
    embed.add_argument("--image-column", metavar="NAME", help="as of fastssl convert, for parquet")
    embed.add_argument("--label-column", metavar="NAME", help="as of fastssl convert, for parquet")
    embed.set_defaults(call=_embed)


def add_neighbours(neighbours: argparse.ArgumentParser) -> None:
    """The arguments of `fastssl neighbours`."""
    neighbours.add_argument("table", type=Path, metavar="X.parquet", help="table of fastssl embed")
    neighbours.add_argument(
        "image", metavar="IMAGE", help="an image file, in the table or not, or the name of another row of the table"
    )
    neighbours.add_argument("-k", type=int, default=10, metavar="K", help="number of neighbours (default: 10)")
    neighbours.add_argument(
        "--model",
        type=Path,
        metavar="RUN|FILE",
        help="the table's model, if it lies elsewhere now; for an image that is not in the table",
    )
    neighbours.add_argument(
        "--similarity",
        choices=_SIMILARITIES,
        default="centred",
        metavar="KIND",
        help="centred: cosine without the table's mean. whitened: directions of equal variance as well. cosine: of the "
        "features as they are (default: centred)",
    )
    neighbours.add_argument("--out", type=Path, metavar="X.png", help="also draw the images in a grid")
    neighbours.add_argument("--json", action="store_true", help="print the neighbours as JSON")
    neighbours.set_defaults(call=_neighbours)


def _embed(args: argparse.Namespace) -> None:
    import torch

    from fastssl import collectives
    from fastssl.commands.device_option import choose_device_option
    from fastssl.config import RunConfig
    from fastssl.embedding.table import check_out
    from fastssl.embedding.write import embed_to_file
    from fastssl.errors import UserError
    from fastssl.processes.rendezvous import joined_processes
    from pipelines.loader import cores_per_process

    check_out(args.out, overwrite=args.overwrite)
    if args.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, not {args.device!r:.100}")
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
        if collectives.rank() > 0:
            return
    print(
        f"{printable(args.out)}: {report.num_images:,} images, {report.num_features:,} features each, "
        f"{report.num_broken:,} broken, in {report.wall_s:.1f} s on {device.type}"
    )
    for path, reason in report.examples:
        print(f"broken: {printable(path)}: {printable(reason)}")
    if report.num_broken > len(report.examples):
        where = f"{args.out}.errors.txt" if args.out.suffix == ".npy" else f"the column error of {args.out}"
        print(f"broken: {report.num_broken - len(report.examples):,} more; see {printable(where)}")
    if args.out.suffix == ".parquet":
        print(f"next: fastssl neighbours {printable(args.out)} IMAGE")


def _neighbours(args: argparse.Namespace) -> None:
    from fastssl.embedding.grid import draw_grid
    from fastssl.embedding.neighbours import find_query, nearest
    from fastssl.embedding.table import read_table

    table = read_table(args.table)
    query = find_query(table, args.image, model=args.model)
    found = nearest(table, query.features, k=args.k, similarity=args.similarity, without=query.row)
    if args.out:
        draw_grid(table, query, found, args.out)
    if args.json:
        about = {"table": str(args.table), "query": query.path, "row": query.row, "similarity": args.similarity}
        print(json.dumps(about | {"neighbours": [each._asdict() for each in found]}, indent=2))
        return
    where = "in the table" if query.row is not None else "embedded with the table's model"
    print(f"{printable(query.path)} ({where}); similarity: {args.similarity}")
    print("rank  similarity  path")
    for each in found:
        print(f"{each.rank:4}  {each.similarity:10.3f}  {printable(each.path)}")
    if args.out:
        print(f"grid: {printable(args.out)}")
