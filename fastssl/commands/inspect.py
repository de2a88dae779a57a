"""`fastssl inspect`: print what a .beton file, or a data set of many, contains and draw a contact sheet."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastssl.commands.options import ANY_IMAGES, Commands, add_command
from fastssl.commands.output import add_json, print_json
from pipelines.errors import DataError
from pipelines.printable import printable


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    inspect = add_command(
        commands, "inspect", "print what a .beton file or a data set of many contains, and draw a contact sheet"
    )
    inspect.add_argument("beton", metavar="X.beton|FOLDER|URL", help=ANY_IMAGES)
    inspect.add_argument(
        "--out",
        type=Path,
        metavar="X.png",
        help="contact sheet to write (default: next to it; of a URL, in this folder)",
    )
    add_json(inspect, "all that is known of it")
    inspect.set_defaults(call=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    if args.json:
        print_json(lambda: _examined(args))
        return
    found = _examined(args)
    lines = _lines_of_shards(found) if "num_shards" in found else _lines(found)
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {printable(value)}")


def _examined(args: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: of a file `pipelines.beton.inspect`, num_labelled, num_classes, checksum and contact_sheet;
    of a data set of many path, `pipelines.shards.describe.describe` and contact_sheet.
    """
    from pipelines.beton import inspect
    from pipelines.contact_sheet import contact_sheet
    from pipelines.shards.describe import beside, describe
    from pipelines.shards.open_images import open_images
    from pipelines.shards.sharded_images import ShardedImages

    reader = open_images(args.beton)
    out = args.out or beside(args.beton, ".png")
    try:
        contact_sheet(reader, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror})") from None
    if isinstance(reader, ShardedImages):
        return {"path": str(reader.path)} | describe(reader.manifest) | {"contact_sheet": str(out)}
    labels = reader.labels[reader.labels >= 0]
    return inspect(args.beton) | {
        "num_labelled": len(labels),
        "num_classes": len(reader.class_names or set(labels.tolist())),
        "checksum": "recorded" if {"rows_sha256", "sha256"} & reader.sidecar.keys() else "none",
        "contact_sheet": str(out),
    }


def _lines(found: Mapping[str, Any]) -> dict[str, str]:
    """The lines for a person, by their headings."""
    width, height = found["width_px"], found["height_px"]
    checksum = "recorded at the conversion; `fastssl verify` compares it"
    return {
        "file": found["path"],
        **_lines_of_images(found),
        "width": f"{_range(width['min'], width['max'])} px, median {width['median']:g}",
        "height": f"{_range(height['min'], height['max'])} px, median {height['median']:g}",
        "bytes": f"{found['file_bytes']:,}, of these images {found['image_bytes']:,}",
        "from": str(found.get("source") or "unknown: no sidecar says where the images come from"),
        "duplicates": _duplicates(found.get("duplicates")),
        "checksum": checksum if found["checksum"] == "recorded" else "none: no sidecar has one",
        "contact sheet": found["contact_sheet"],
    }


def _lines_of_images(found: Mapping[str, Any]) -> dict[str, str]:
    num_images, num_labelled, modes = found["num_images"], found["num_labelled"], found["modes"]
    counts = [num for name, num in found["class_counts"].items() if name != "unlabelled"]
    each = f", {_range(min(counts), max(counts))} images each" if counts else ""
    labels = {0: "no", num_images: "yes"}.get(num_labelled, f"{num_labelled:,} of {num_images:,} images")
    return {
        "images": f"{num_images:,} ({modes['jpg']:,} JPEG, {modes['raw']:,} raw)",
        "labels": labels,
        "classes": f"{found['num_classes']:,}{each}" if num_labelled else "none",
    }


def _lines_of_shards(found: Mapping[str, Any]) -> dict[str, str]:
    """As `_lines`, of a data set of many files: what its manifest says."""
    size = f"{found['height_px']} x {found['width_px']} px, all" if found["height_px"] else "several"
    return {
        "data set": found["path"],
        "shards": f"{found['num_shards']:,}",
        **_lines_of_images(found),
        "height x width": size,
        "bytes": f"{found['file_bytes']:,}, of these images {found['image_bytes']:,}",
        "digest": f"{found['digest']}; `fastssl verify` compares all images",
        "contact sheet": found["contact_sheet"],
    }


def _duplicates(counted: object) -> str:
    """The line about the sidecar's entry, as `count_duplicates` writes it."""
    entry = counted if isinstance(counted, dict) else {}
    copies, similar = entry.get("copies"), entry.get("similar")
    if type(copies) is not int:
        return "unknown: no sidecar has their number"
    more = f"{similar:,} more look almost like another" if type(similar) is int else "similar ones not counted"
    return f"{copies:,} copies of other images, {more}"


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
