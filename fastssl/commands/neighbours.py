"""`fastssl neighbours`: the images of a table that are most similar to one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.commands.options import Commands, add_command
from fastssl.commands.output import add_json, print_json
from pipelines.printable import printable

if TYPE_CHECKING:
    from fastssl.embedding.neighbours import Neighbour, Query

_SIMILARITIES = ("centred", "whitened", "cosine")


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    neighbours = add_command(commands, "neighbours", "find the images of a table that are most similar to one")
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
    add_json(neighbours, "the neighbours")
    neighbours.set_defaults(call=_neighbours)


def _neighbours(args: argparse.Namespace) -> None:
    if args.json:
        print_json(lambda: _as_values(args, *_found(args)))
    else:
        _print_lines(args, *_found(args))


def _found(args: argparse.Namespace) -> "tuple[Query, list[Neighbour]]":
    from fastssl.embedding.grid import draw_grid
    from fastssl.embedding.neighbours import find_query, nearest
    from fastssl.embedding.table import read_table

    table = read_table(args.table)
    query = find_query(table, args.image, model=args.model)
    found = nearest(table, query.features, k=args.k, similarity=args.similarity, without=query.row)
    if args.out:
        draw_grid(table, query, found, args.out)
    return query, found


def _as_values(args: argparse.Namespace, query: "Query", found: "list[Neighbour]") -> dict[str, Any]:
    about = {"table": args.table, "query": query.path, "row": query.row, "similarity": args.similarity}
    return about | {"neighbours": [each._asdict() for each in found]}


def _print_lines(args: argparse.Namespace, query: "Query", found: "list[Neighbour]") -> None:
    where = "in the table" if query.row is not None else "embedded with the table's model"
    print(f"{printable(query.path)} ({where}); similarity: {args.similarity}")
    print("rank  similarity  path")
    for each in found:
        print(f"{each.rank:4}  {each.similarity:10.3f}  {printable(each.path)}")
    if args.out:
        print(f"grid: {printable(args.out)}")
