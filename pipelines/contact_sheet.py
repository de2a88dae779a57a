"""A grid of sample images, to inspect the contents of a .beton file."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipelines.beton import BetonReader
from pipelines.printable import printable

TEXT_PX = 14  # height of the line under each picture
FONT_PX = 11
GAP_PX = 2
MAX_CAPTION_CHARS = 200


def contact_sheet(
    reader: BetonReader, out_png: str | Path, num_images: int = 64, cell_px: int = 96, seed: int = 0
) -> None:
    """Write a PNG grid of randomly chosen images, each with its class name (or label) under it.

    Args:
        reader: The file.
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
    num = min(num_images, reader.num_samples)
    ids = np.sort(np.random.default_rng(seed).choice(reader.num_samples, num, replace=False))
    num_columns = math.ceil(math.sqrt(num))
    step_x, step_y = cell_px + GAP_PX, cell_px + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (num_columns * step_x, math.ceil(num / num_columns) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PX)
    for k, i in enumerate(ids):
        left, top = k % num_columns * step_x, k // num_columns * step_y
        picture = _fit(Image.fromarray(reader.decode(i)), cell_px)
        sheet.paste(picture, (left + (cell_px - picture.width) // 2, top + (cell_px - picture.height) // 2))
        draw.text((left, top + cell_px), _caption(reader, i, font, cell_px), "black", font)
    sheet.save(out_png, "PNG")


def _fit(image: Image.Image, cell_px: int) -> Image.Image:
    smooth = max(image.size) > cell_px
    scale = cell_px / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def _caption(reader: BetonReader, i: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    label = int(reader.labels[i])
    names = reader.class_names or []
    text = printable(names[label] if 0 <= label < len(names) else "" if label < 0 else label, MAX_CAPTION_CHARS)
    while font.getlength(text) > width_px:
        text = text[:-1]
    return text
