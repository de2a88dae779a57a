"""`fastssl manifest`: write the manifest of a data set of many .beton files."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastssl.commands.options import Commands, add_command
from fastssl.commands.output import add_json, print_json
from pipelines.printable import printable

if TYPE_CHECKING:
    from pipelines.shards.build import ManifestReport

_REMOTE_THREADS = 16  # which wait for requests most of the time


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    manifest = add_command(
        commands, "manifest", "write dataset.json, which makes a folder of .beton files one data set"
    )
    manifest.add_argument(
        "place",
        metavar="FOLDER|URL",
        help="folder with the .beton files, or its URL (s3://, gs://, az://, or https:// with a list of files); of "
        "numbered files, such as x-00000-of-00004.beton, all must be there",
    )
    manifest.add_argument(
        "--verify", action="store_true", help="read all images and compare them with their checksums in X.beton.rows"
    )
    manifest.add_argument(
        "--check", action="store_true", help="write nothing; fail if the files are not those of the manifest"
    )
    add_json(manifest)
    manifest.set_defaults(call=_manifest)


def _manifest(args: argparse.Namespace) -> None:
    if args.json:
        print_json(lambda: asdict(_written(args)))
        return
    done = _written(args)
    classes = "no class names" if done.num_classes is None else f"{done.num_classes:,} classes"
    line = (
        f"{printable(done.path)}: {done.num_shards:,} shards, {done.num_images:,} images "
        f"({done.num_images - done.num_raw:,} JPEG, {done.num_raw:,} raw), {done.num_bytes:,} bytes, {classes}"
    )
    if done.num_rows_written:
        line += f"; rows files written: {done.num_rows_written:,}"
    if args.verify:
        line += "; all images match their checksums"
    print(f"{line}; {'matches the files' if args.check else 'written'}")


def _written(args: argparse.Namespace) -> "ManifestReport":
    from pipelines.remote.store import is_url
    from pipelines.shards.build import check_manifest, write_manifest
    from pipelines.shards.store import opened_store

    num_threads = _REMOTE_THREADS if is_url(args.place) else None
    with opened_store(args.place) as store:
        return (check_manifest if args.check else write_manifest)(store, verify=args.verify, num_threads=num_threads)
