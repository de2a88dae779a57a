"""Folders of images for conversions."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image_folder(folder: Path, num_images: int) -> Path:
    """Small PNG and JPEG files of two classes and several widths, every fiftieth of them empty; returns the folder."""
    rng = np.random.default_rng(0)
    for i in range(num_images):
        path = folder / "ab"[i % 2] / f"{i:03d}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 17 + i % 5, 3), np.uint8)).save(path)
        if i % 50 == 7:
            path.write_bytes(b"")
    return folder
