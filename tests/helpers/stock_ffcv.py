"""FFCV's own Loader in a separate process: it makes numba's type of uint8 arrays read-only for the whole process."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers.processes import ROOT, environment


def read(path: Path, decoder: str, *, os_cache: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Read all images and labels of a .beton in file order, in batches of four.

    FFCV runs as plain Python, which saves a minute of compilation.

    Args:
        path: The .beton file.
        decoder: "whole", or "centre_16px": a centre crop.
        os_cache: FFCV's option: the page cache of the operating system, or FFCV's own cache of pages.
    Returns:
        Images uint8 [N, H, W, 3] and labels int64 [N].
    """
    out = path.with_suffix(".npz")
    command = [sys.executable, "-m", __spec__.name, str(path), decoder, str(int(os_cache)), str(out)]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=240)
    found = np.load(out)
    return found["images"], found["labels"]


def _main(path: str, decoder: str, os_cache: str, out: str) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler

    decoders = {"whole": SimpleRGBImageDecoder(), "centre_16px": CenterCropRGBImageDecoder((16, 16), 1.0)}
    Compiler.set_enabled(False)
    loader = Loader(
        path,
        batch_size=4,
        num_workers=1,
        os_cache=bool(int(os_cache)),
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [decoders[decoder]], "label": [IntDecoder()]},
    )
    batches = [(np.array(images), np.array(labels)[:, 0]) for images, labels in loader]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.savez(out, images=images, labels=labels)


if __name__ == "__main__":
    _main(*sys.argv[1:])
