"""Whether the short searches of `linear` and `logistic` choose what their whole grids choose, and the time they take.

python benchmarks/bench_eval_search.py --cifar /data/cifar10 --out benchmarks/results/eval_search.csv

Four sets of features: the pixels of scikit-learn's digits; pixels, and random convolutions, of 2,000 images of
CIFAR-10; the pixels of drawn characters in random fonts, 100 classes of 20 images. CIFAR-10 is a folder of WebP strips
of 500 images and labels.npz; without --cifar its rows are left out. Both searches see the same images.
"""

import argparse
import dataclasses
import json
import math
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # as a script, only benchmarks/ is on Python's path: add the repository root
    sys.path[0] = str(ROOT)

from fastssl.evaluation.accuracy import judge  # noqa: E402
from fastssl.evaluation.config import EvalConfig, SearchName  # noqa: E402
from fastssl.evaluation.linear import linear  # noqa: E402
from fastssl.evaluation.logistic import logistic  # noqa: E402
from fastssl.evaluation.task import Outcome, Task  # noqa: E402
from fastssl.tracking.result_rows import Value, append_rows, environment_columns, format_table  # noqa: E402

PACKAGES = ("torch", "numpy", "scikit-learn")
SEARCHES: tuple[SearchName, ...] = ("full", "halving")
SHOWN = ("features", "protocol", "full_percent", "halving_percent", "standard_error", "full_cpu_s", "halving_cpu_s")
NUM_CIFAR = 2000
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + "äöüßñé"

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # training features and labels, then those of the test


def digits() -> Arrays:
    """Pixels of scikit-learn's digits, 1,297 and 500."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = pixels[order].astype(np.float32), labels[order].astype(np.int64)
    return x[:1297], y[:1297], x[1297:], y[1297:]


def characters(num_train: int = 20, num_test: int = 20) -> Arrays:
    """Pixels of characters drawn at random places and angles, 16 px; 100 classes.

    Args:
        num_train: Training images per class.
        num_test: Test images per class.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    files = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("DejaVuSans*"))
    fonts = [ImageFont.truetype(str(file), size) for file in files if "Display" not in file.name for size in (18, 22)]
    rng = np.random.default_rng(0)
    images, labels = [], []
    for _ in range(num_train + num_test):
        for label, character in enumerate(CHARACTERS):
            image = Image.new("L", (32, 32))
            place = tuple(16 + rng.integers(-2, 3, 2).astype(float))
            font = fonts[rng.integers(len(fonts))]
            ImageDraw.Draw(image).text(place, character, font=font, fill=200, anchor="mm")
            pixels = np.asarray(image.rotate(rng.normal(0, 6), Image.Resampling.BILINEAR), np.float32)
            images.append((pixels + rng.normal(0, 20, (32, 32))).reshape(16, 2, 16, 2).mean((1, 3)).ravel() / 255)
            labels.append(label)
    x, y, num = np.array(images, np.float32), np.array(labels, np.int64), num_train * len(CHARACTERS)
    return x[:num], y[:num], x[num:], y[num:]


def cifar_pixels(folder: Path) -> Arrays:
    """Pixels of CIFAR-10 at 16 px: 768 features."""
    return _cifar(folder, lambda x: x.reshape(len(x), 16, 2, 16, 2, 3).mean((2, 4)).reshape(len(x), -1))


def cifar_convolutions(folder: Path) -> Arrays:
    """An encoder without training: 128 random filters of 6 px, rectified and averaged over quarters of the image."""
    weight = torch.randn(128, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    weight -= weight.mean((1, 2, 3), keepdim=True)

    def encode(x: np.ndarray) -> np.ndarray:
        maps = torch.nn.functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), weight, stride=2).relu()
        return torch.nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1).numpy()

    return _cifar(folder, encode)


def _cifar(folder: Path, encode: Callable[[np.ndarray], np.ndarray]) -> Arrays:
    from PIL import Image

    labels, arrays = np.load(folder / "labels.npz"), []
    for split in ("train", "test"):
        files = sorted(folder.glob(f"{split}_*.webp"))[: NUM_CIFAR // 500]
        strips = [
            np.asarray(Image.open(file).convert("RGB"), np.float32).reshape(-1, 32, 32, 3) / 255 for file in files
        ]
        arrays += [encode(np.concatenate(strips)), labels[f"y_{split}"][:NUM_CIFAR].astype(np.int64)]
    return tuple(arrays)  # pyright: ignore[reportReturnType]


def compare(name: str, arrays: Arrays) -> list[dict[str, Value]]:
    """A row for each protocol: accuracy, choice and CPU seconds of each search, and the accuracy's standard error."""
    train_x, train_y, test_x, test_y = arrays
    num_classes = int(train_y.max()) + 1
    task = Task(cfg=EvalConfig(), train_x=train_x, train_y=train_y, test_x=test_x, num_classes=num_classes)
    rows = []
    protocols: dict[str, Callable[[Task], dict[str, Outcome]]] = {"linear": linear, "logistic": logistic}
    for protocol, run in protocols.items():
        row: dict[str, Value] = {"features": name, "protocol": protocol, "num_train": len(train_y)}
        row |= {"num_features": train_x.shape[1], "num_classes": num_classes}
        for search in SEARCHES:
            started_s = time.process_time()
            outcome = run(dataclasses.replace(task, cfg=EvalConfig(search=search)))[protocol]
            row[f"{search}_cpu_s"] = round(time.process_time() - started_s, 2)
            row[f"{search}_percent"] = round(100 * judge(outcome.ranked, test_y, num_classes)["top1"], 2)
            row[f"{search}_chosen"] = json.dumps(outcome.chosen)
        fraction = float(row["full_percent"] or 0) / 100
        row["standard_error"] = round(100 * math.sqrt(fraction * (1 - fraction) / len(test_y)), 2)
        rows.append(row)
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, metavar="FOLDER", help="CIFAR-10 as WebP strips; default: without it")
    parser.add_argument("--out", type=Path, metavar="X.csv", help="append the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets: dict[str, Callable[[], Arrays]] = {"digits, pixels": digits, "characters, pixels": characters}
    if args.cifar:
        sets["CIFAR-10, pixels"] = lambda: cifar_pixels(args.cifar)
        sets["CIFAR-10, random convolutions"] = lambda: cifar_convolutions(args.cifar)
    rows, environment = [], environment_columns(PACKAGES)
    for name, load in sets.items():
        found = compare(name, load())
        print(format_table(found, SHOWN), flush=True)
        if args.out:
            append_rows(args.out, [row | environment for row in found])
        rows += found
    print(format_table(rows, SHOWN))


if __name__ == "__main__":
    main()
