"""Benchmark the pixel op on the available device: milliseconds per batch, and bytes compared with a memory copy.

    python benchmarks/bench_augment.py --out benchmarks/results/augment.csv

Views are random; the parameters of the ops are drawn as in training. Measured in alternation: the full recipe, the
recipe without blur, kornia's operators if it is installed, and 32 px views cut from images on the device, as in the
`resident` engine.
"""

# B samples, V views, S side length of a view in pixels

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import CallTime, time_call
from fastssl.tracking.result_rows import append_rows, environment_columns, format_table, spread
from kernels.augment import StoredImages, augment
from pipelines.views import RECIPES, ViewsConfig, ViewSpec, draw

PACKAGES = ("torch", "triton", "numba", "kornia")
BATCHES = {"cpu": (16, 256), "cuda": (256, 2048)}  # number of samples at 224 px, at 32 px
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
SHOWN = ("op", "size_px", "num_views", "ms_p50", "host_ms_p50", "views_per_s", "gb_per_s", "share_of_copy", "note")
VIEWS = ViewsConfig()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, nargs=2, metavar=("AT_224", "AT_32"), help="samples of a batch")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV to append to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here")
    if args.repetitions < 1 or (args.samples and min(args.samples) < 1):
        parser.error("--repetitions and --samples must be >= 1")
    environment = environment_columns(PACKAGES)
    rows = measure(torch.device(args.device), args.samples or BATCHES[args.device], args.repetitions, args.seed)
    print(format_table(rows, SHOWN))
    if args.out:
        append_rows(args.out, [row | environment for row in rows])


def measure(device: torch.device, samples: tuple[int, int], repetitions: int, seed: int) -> list[dict[str, Any]]:
    """Measure all ops in alternation; return one row for each."""
    calls: dict[str, tuple[Callable[[], object], int, int, int]] = {}  # call, views, S, bytes
    byol = RECIPES["byol"]
    sharp = tuple(replace(spec, blur_p=0.0) for spec in byol)
    calls["byol"] = _on_views(byol, samples[0], device, seed)
    calls["byol without blur"] = _on_views(sharp, samples[0], device, seed)
    if (of_kornia := _kornia(sharp, samples[0], device)) is not None:
        calls["kornia, byol without blur"] = of_kornia
    calls["simclr"] = _on_views(RECIPES["simclr"], samples[1], device, seed)
    if device.type == "cuda":
        calls["simclr, cut from stored images"] = _on_stored(samples[1], device, seed)
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls["copy"] = (lambda: target.copy_(source), 0, 0, 2 * source.nbytes)
    times_ms: dict[str, list[CallTime]] = {name: [] for name in calls}
    for repetition in range(-2, repetitions):  # the first two compile and warm up
        for name, (call, *_) in calls.items():
            found = time_call(call, device)
            if repetition >= 0:
                times_ms[name].append(found)
    copy_bytes_per_ms = calls["copy"][3] / spread([each.ms for each in times_ms["copy"]])["p50"]
    rows = []
    for name, (_, num_views, size_px, num_bytes) in calls.items():
        ms = spread([each.ms for each in times_ms[name]])
        rows.append(
            {"op": name, "device": device.type, "num_views": num_views, "size_px": size_px}
            | {f"ms_{key}": round(value, 4) for key, value in ms.items()}
            | {
                "host_ms_p50": round(spread([each.host_ms for each in times_ms[name]])["p50"], 4),
                "views_per_s": round(1000 * num_views / ms["p50"]),
                "gb_per_s": round(num_bytes / ms["p50"] / 1e6, 2),
                "share_of_copy": round(num_bytes / ms["p50"] / copy_bytes_per_ms, 3),
                "repetitions": repetitions,
                "seed": seed,
                "note": "" if "kornia" not in name else "float views; flip, jitter, grayscale, normalise",
            }
        )
    return rows


def _draw(specs: tuple[ViewSpec, ...], num: int, seed: int, side_px: int) -> np.ndarray:
    return draw(specs, seed, 0, np.arange(num), np.full((num, 2), side_px))


def _on_views(
    specs: tuple[ViewSpec, ...], num: int, device: torch.device, seed: int
) -> tuple[Callable[[], object], int, int, int]:
    """The op on pixel levels on the device; its bytes are one read of the levels and one write of the result."""
    side_px = specs[0].size_px
    shape = (num, len(specs), side_px, side_px, 3)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    params = _draw(specs, num, seed, side_px)
    settings: dict[str, Any] = {"mean": VIEWS.mean, "std": VIEWS.std}
    if device.type == "cpu":
        from kernels.augment.cpu import OutputPool

        views, dtype = levels, torch.float32
        settings["outputs"] = OutputPool()
    else:
        views, dtype = torch.from_numpy(levels).to(device), torch.bfloat16
    settings["dtype"] = dtype
    num_bytes = levels.size * (1 + dtype.itemsize)
    return lambda: augment(views, params, **settings), num * len(specs), side_px, num_bytes


def _on_stored(num: int, device: torch.device, seed: int) -> tuple[Callable[[], object], int, int, int]:
    """Also crop and resize from stored images, as `resident` does; bytes are those of the result and of the images."""
    specs, rng = RECIPES["simclr"], np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)).to(device)
    ids = torch.from_numpy(rng.integers(0, 50_000, num)).to(device)
    params, settings = _draw(specs, num, seed, 32), {"mean": VIEWS.mean, "std": VIEWS.std, "dtype": torch.bfloat16}
    stored = StoredImages(images, ids, 32)
    num_bytes = num * len(specs) * 32 * 32 * 3 * 3
    return lambda: augment(stored, params, **settings), num * len(specs), 32, num_bytes  # pyright: ignore


def _kornia(
    specs: tuple[ViewSpec, ...], num: int, device: torch.device
) -> tuple[Callable[[], object], int, int, int] | None:
    """kornia's operators on float views, as its users call them; None if it is not installed."""
    try:
        import kornia.augmentation as K
    except ImportError:
        return None
    side_px, spec = specs[0].size_px, specs[0]
    views = torch.rand(num * len(specs), 3, side_px, side_px, device=device)
    op = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=spec.flip_p),
        K.ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue, p=spec.jitter_p),
        K.RandomGrayscale(p=spec.grayscale_p),
        K.Normalize(torch.tensor(VIEWS.mean), torch.tensor(VIEWS.std)),
    )
    return lambda: op(views), num * len(specs), side_px, 2 * views.nbytes


if __name__ == "__main__":
    main()
