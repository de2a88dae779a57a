"""A picture of an image and its nearest neighbours."""

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastssl.embedding.images import Images, open_images
from fastssl.embedding.neighbours import Neighbour, Query
from fastssl.embedding.table import Table
from fastssl.errors import UserError
from pipelines.contact_sheet import FONT_PX, fit, picture_grid
from pipelines.convert.images import CorruptImageError, quiet_pillow, read_upright
from pipelines.errors import DataError
from pipelines.printable import printable

CELL_PX = 160
_REOPENED = ("beton", "shards", "webdataset", "parquet", "npz")  # sources whose images are not files of their own
_CHARS_PER_LINE = 24


def draw_grid(table: Table, query: Query, found: Sequence[Neighbour], out: Path) -> None:
    """Write a PNG: the query first, then its neighbours with rank and similarity under them.

    Images are read where the table says that they are, also from .beton, parquet, tar and npz files. One that cannot be
    read is a grey square with its name.

    Args:
        table: The table.
        query: From `find_query`.
        found: From `nearest`.
        out: The picture; an existing one is replaced.

    Raises:
        UserError: it cannot be written.
    """
    source = cache(lambda: _reopened(table.about))
    with quiet_pillow():
        cells = [(_picture(query.path, query.row, source), "query")]
        cells += [(_picture(each.path, each.row, source), f"{each.rank}: {each.similarity:.3f}") for each in found]
    partial = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        picture_grid(cells, CELL_PX).save(partial, "PNG")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from None
    finally:
        with suppress(OSError):  # its folder may be none
            partial.unlink(missing_ok=True)


def _picture(path: str, row: int | None, source: Callable[[], Images | None]) -> Image.Image:
    try:
        if os.path.isfile(path):
            return fit(Image.fromarray(np.ascontiguousarray(read_upright(path))), CELL_PX)
        images = source() if row is not None else None
        if images is not None and row is not None and row < images.num_images:
            for entry in images.entries(row, row + 1):
                return fit(Image.fromarray(np.ascontiguousarray(entry.read())), CELL_PX)
    except (CorruptImageError, DataError):
        pass  # it is shown as missing
    return _missing(path)


def _reopened(about: Mapping[str, Any]) -> Images | None:
    """The source of a table, if it is still the same."""
    origin = about.get("source")
    if not isinstance(origin, dict) or origin.get("kind") not in _REOPENED or not isinstance(origin.get("src"), str):
        return None
    options = origin.get("options")
    try:
        images = open_images(origin["src"], origin["kind"], options if isinstance(options, dict) else {})
    except (DataError, UserError, TypeError):
        return None
    return images if images.fingerprint == about.get("fingerprint") else None


def _missing(path: str) -> Image.Image:
    cell = Image.new("RGB", (CELL_PX, CELL_PX), "lightgrey")
    name = printable(os.path.basename(path) or path, 8 * _CHARS_PER_LINE)
    text = "\n".join(["missing:", *textwrap.wrap(name, _CHARS_PER_LINE)])
    ImageDraw.Draw(cell).text((4, 4), text, "black", ImageFont.load_default(FONT_PX))
    return cell
