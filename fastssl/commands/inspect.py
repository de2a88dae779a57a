"""`fastssl inspect`: print what a .beton file contains and draw a contact sheet."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastssl.commands.options import Commands, add_command
from fastssl.commands.output import add_json, print_json
from pipelines.errors import DataError
from pipelines.printable import printable


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    inspect = add_command(commands, "inspect", "print what a .beton file contains and draw a contact sheet")
    inspect.add_argument("beton", type=Path, metavar="X.beton", help="the file to inspect")
    inspect.add_argument("--out", type=Path, metavar="X.png", help="contact sheet to write (default: next to the file)")
    add_json(inspect, "all that is known of the file")
    inspect.set_defaults(call=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    if args.json:
        print_json(lambda: _examined(args))
        return
    lines = _lines(_examined(args))
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {printable(value)}")


def _examined(args: argparse.Namespace) -> dict[str, Any]:
    """What --json prints: `pipelines.beton.inspect`, num_labelled, num_classes, checksum and contact_sheet."""
    from pipelines.beton import BetonReader, inspect
    from pipelines.contact_sheet import contact_sheet

    found, reader = inspect(args.beton), BetonReader(args.beton)
    labels = reader.labels[reader.labels >= 0]
    out = args.out or args.beton.with_name(f"{args.beton.name}.png")
    try:
        contact_sheet(reader, out)
    except OSError as error:
        raise DataError(f"{out} cannot be written ({error.strerror})") from None
    return found | {
        "num_labelled": len(labels),
        "num_classes": len(reader.class_names or set(labels.tolist())),
        "checksum": "recorded" if "sha256" in reader.sidecar else "none",
        "contact_sheet": str(out),
    }


def _lines(found: Mapping[str, Any]) -> dict[str, str]:
    """The lines for a person, by their headings."""
    num_images, num_labelled, modes = found["num_images"], found["num_labelled"], found["modes"]
    counts = [num for name, num in found["class_counts"].items() if name != "unlabelled"]
    each = f", {_range(min(counts), max(counts))} images each" if counts else ""
    width, height = found["width_px"], found["height_px"]
    checksum = "sha256 recorded at the conversion; `fastssl verify` compares it"
    labels = {0: "no", num_images: "yes"}.get(num_labelled, f"{num_labelled:,} of {num_images:,} images")
    return {
        "file": found["path"],
        "images": f"{num_images:,} ({modes['jpg']:,} JPEG, {modes['raw']:,} raw)",
        "labels": labels,
        "classes": f"{found['num_classes']:,}{each}" if num_labelled else "none",
        "width": f"{_range(width['min'], width['max'])} px, median {width['median']:g}",
        "height": f"{_range(height['min'], height['max'])} px, median {height['median']:g}",
        "bytes": f"{found['file_bytes']:,}, of these images {found['image_bytes']:,}",
        "from": str(found.get("source") or "unknown: no sidecar says where the images come from"),
        "duplicates": _duplicates(found.get("duplicates")),
        "checksum": checksum if found["checksum"] == "recorded" else "none: no sidecar has one",
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
