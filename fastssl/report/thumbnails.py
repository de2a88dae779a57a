"""Pictures as data URIs: many small ones in one sheet, filters, and the picture of the views."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

CELL_PX = 48
_MAX_WIDTH_PX = 1600
_QUALITY = 80
_FILTERS_PX = 512  # width of all filters together, where they are small


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Thumbnails in one picture, row by row.

    Attributes:
        uri: The picture.
        num_columns, num_rows: Of its cells.
    """

    uri: str
    num_columns: int
    num_rows: int

    def style(self, position: int) -> str:
        """CSS that moves the sheet, as an element's background, to one of its thumbnails."""
        row, column = divmod(position, self.num_columns)
        x = 100 * column / max(self.num_columns - 1, 1)
        y = 100 * row / max(self.num_rows - 1, 1)
        return f"background-position:{x:.4f}% {y:.4f}%"


def draw_sheet(thumbnails: Sequence[Image.Image]) -> Sheet:
    """One WebP of all thumbnails, each in the middle of its cell; at least one, of at most CELL_PX."""
    num_columns = math.ceil(math.sqrt(len(thumbnails)))
    num_rows = math.ceil(len(thumbnails) / num_columns)
    cell_px = max(max(thumbnail.size) for thumbnail in thumbnails)
    sheet = Image.new("RGB", (num_columns * cell_px, num_rows * cell_px))
    for position, thumbnail in enumerate(thumbnails):
        row, column = divmod(position, num_columns)
        left, top = (cell_px - thumbnail.width) // 2, (cell_px - thumbnail.height) // 2
        sheet.paste(thumbnail, (column * cell_px + left, row * cell_px + top))
    return Sheet(uri=_uri(sheet, quality=_QUALITY), num_columns=num_columns, num_rows=num_rows)


def draw_filters(filters: np.ndarray) -> str:
    """Filters [num, 3, H, W] side by side, each from its own least to its own largest weight; a data URI."""
    low, high = filters.min((1, 2, 3), keepdims=True), filters.max((1, 2, 3), keepdims=True)
    levels = ((filters - low) / np.maximum(high - low, 1e-12) * 255).round().astype(np.uint8)
    cells = np.pad(levels.transpose(0, 2, 3, 1), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    num_columns = min(16, len(cells))
    blank = -len(cells) % num_columns
    cells = np.concatenate([cells, np.full((blank, *cells.shape[1:]), 128, np.uint8)])
    rows = [np.concatenate(list(row), axis=1) for row in cells.reshape(-1, num_columns, *cells.shape[1:])]
    picture = Image.fromarray(np.concatenate(rows))
    zoom = max(1, _FILTERS_PX // picture.width)
    enlarged = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    return _uri(enlarged, lossless=True)


def smaller(picture: bytes) -> str | None:
    """A picture file as a data URI, at most _MAX_WIDTH_PX wide; None: it is damaged."""
    try:
        image = Image.open(io.BytesIO(picture), formats=["PNG"]).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    image.thumbnail((_MAX_WIDTH_PX, 1 << 14))
    return _uri(image, quality=_QUALITY)


def _uri(image: Image.Image, **options: float) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
