"""Pictures of many images, each with a line under it: to inspect a .beton file, or the result of a search."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.printable import printable
from pipelines.samples import decode_sample
from pipelines.shards.open_images import AnyImages, few_samples

TEXT_PX = 14  # height of the line under each picture
FONT_PX = 11
GAP_PX = 2
MAX_CAPTION_CHARS = 200


def contact_sheet(
    images: AnyImages, out_png: str | Path, num_images: int = 64, cell_px: int = 96, seed: int = 0
) -> None:
    """Write a PNG grid of randomly chosen images, each with its class name (or label) under it.

    Args:
        images: The open file or data set.
        out_png: The picture to write.
        num_images: Maximum number of images.
        cell_px: Side of one cell in pixels; images are scaled to fit, and small ones are enlarged without smoothing.
        seed: Seed of the choice of images.
    Raises:
        ValueError: num_images or cell_px < 1.
        DataError: an image cannot be decoded.
    """
    if num_images < 1 or cell_px < 1:
        raise ValueError(f"num_images and cell_px must be >= 1, not {num_images} and {cell_px}")
    num = min(num_images, images.num_samples)
    ids = np.sort(np.random.default_rng(seed).choice(images.num_samples, num, replace=False))
    samples = few_samples(images, ids)
    cells = [
        (fit(Image.fromarray(decode_sample(images.path, samples, k)), cell_px), _caption(images, int(label)))
        for k, label in enumerate(samples.labels)
    ]
    picture_grid(cells, cell_px).save(out_png, "PNG")


def picture_grid(cells: Sequence[tuple[Image.Image, str]], cell_px: int) -> Image.Image:
    """Pictures in rows and columns of about equal number, each with its caption under it, cut to the cell's width.

    Args:
        cells: Pictures of at most `cell_px` in height and width, and captions; at least one.
        cell_px: Side of a cell in pixels.
    """
    num_columns = math.ceil(math.sqrt(len(cells)))
    step_x, step_y = cell_px + GAP_PX, cell_px + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (num_columns * step_x, math.ceil(len(cells) / num_columns) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for k, (picture, caption) in enumerate(cells):
        left, top = k % num_columns * step_x, k // num_columns * step_y
        sheet.paste(picture, (left + (cell_px - picture.width) // 2, top + (cell_px - picture.height) // 2))
        draw.text((left, top + cell_px), cut_text(caption, font, cell_px), "black", font)
    return sheet


def fit(image: Image.Image, cell_px: int) -> Image.Image:
    """Scale a picture to a cell; a small one is enlarged without smoothing."""
    smooth = max(image.size) > cell_px
    scale = cell_px / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def _caption(images: AnyImages, label: int) -> str:
    names = images.class_names or []
    return str(names[label] if 0 <= label < len(names) else "" if label < 0 else label)


def cut_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """The beginning of a text that fits a width, in printable characters."""
    text = printable(text, MAX_CAPTION_CHARS)
    while font.getlength(text) > width_px:
        text = text[:-1]
    return text
