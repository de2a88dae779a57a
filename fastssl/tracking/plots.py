"""Pictures of a run: the views that the network sees, and its curves."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastssl.config import Config
from fastssl.tracking.run_folder import RunFolder
from fastssl.tracking.writers import read_rows
from pipelines.batch import Batch
from pipelines.errors import DataError
from pipelines.loader import build_loader, cores_per_process, open_train_images
from pipelines.views import ViewsConfig

_CELL_PX = 96  # small views are enlarged to this height, pixel by pixel


def draw_views(batch: Batch, views: ViewsConfig, path: Path, num_images: int = 12) -> None:
    """Write a PNG grid, one column per image, one row per view, as the network sees them (normalisation undone).

    Args:
        batch: Any training batch.
        views: Provides mean and standard deviation of the normalisation.
        path: The PNG file.
        num_images: Maximum number of columns.
    """
    rows = [_cells(view[:num_images].float().cpu().numpy(), views) for view in batch.views]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate(padded)).save(path)


def preview_views(cfg: Config, path: Path) -> None:
    """Write a PNG grid of views of the first images of an epoch, as training with this config sees them.

    Args:
        cfg: data.train, data.global_batch_size, the views and run.seed are used.
        path: The PNG file.
    Raises:
        DataError: the file cannot be read, a sample cannot be decoded, or the PNG cannot be written.
    """
    reader = open_train_images(cfg.data)
    process = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "num_threads": cores_per_process()}
    loader = build_loader(reader, cfg.data, cfg.views, seed=cfg.run.seed, **process)
    try:
        with closing(loader.epoch(0)) as batches:
            draw_views(next(batches), cfg.views, path, num_images=cfg.data.global_batch_size)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror})") from None
    finally:
        loader.close()


def draw_curves(folder: RunFolder) -> None:
    """Write curves.png from metrics.jsonl: loss, accuracies, RankMe and images per second over the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(folder.metrics, "step")
    steps = [row for row in rows if "kind" not in row]
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    held_out = [row for row in rows if row.get("kind") == "held_out"]
    panels = [
        (steps, "loss", "loss"),
        (epochs, "online_top1", "online linear probe, top-1 on held-out images"),
        *([(held_out, "knn_top1", "kNN, top-1 on held-out images")] if held_out else []),
        (epochs, "rankme_z", "RankMe of the projections"),
        (steps, "img_per_s", "images a second"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.25 * len(panels), 3.6), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        _curve(axis, *panel)
    axes[-1].set_ylim(bottom=0)
    figure.suptitle(str(folder.path), parse_math=False)  # a $ in the name does not start a formula
    figure.savefig(folder.curves, dpi=120)
    plt.close(figure)


def _curve(axis: Any, rows: list[dict[str, Any]], key: str, title: str) -> None:
    points = [(row["step"], row[key]) for row in rows if _is_plain_number(row.get(key))]
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if points:
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
    else:
        axis.text(0.5, 0.5, "no rows", ha="center", transform=axis.transAxes)


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < sys.float_info.max  # not NaN either


def _cells(view: np.ndarray, views: ViewsConfig) -> np.ndarray:
    """Normalised views [n, 3, H, W] -> uint8 image [H', n W', 3]."""
    levels = view.transpose(0, 2, 3, 1) * np.asarray(views.std) + np.asarray(views.mean)
    pixels = (levels * 255).round().clip(0, 255).astype(np.uint8)
    zoom = max(1, _CELL_PX // pixels.shape[1])
    pixels = np.pad(pixels.repeat(zoom, 1).repeat(zoom, 2), ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)
    return np.concatenate(list(pixels), axis=1)
